"""Deployment: rotations that become part of the heads, and copies of a model that keep up."""
