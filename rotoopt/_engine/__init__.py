"""The method, assembled once: what happens before, in and after a backward pass."""
