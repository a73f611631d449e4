"""The rotations, and how they turn: tensors only."""
