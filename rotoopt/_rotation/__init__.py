"""The rotations and their updates: tensors only."""
