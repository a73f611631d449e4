"""From the representation through the rotations into the heads, and the task gradients on their way back."""
