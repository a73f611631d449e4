"""From the representation through the rotations into the heads, and the task gradients in the backward pass."""
