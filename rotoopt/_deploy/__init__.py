"""Deployment: folding rotations into the heads, and updating copies of a model."""
