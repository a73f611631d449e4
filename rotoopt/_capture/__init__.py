"""From the representation through the rotations into the heads, and the gradient of each task on its way back."""
