"""The method, assembled once: the steps before, during and after a backward pass."""
