"""The interface to torch: the wrapper, processes, devices, checkpoints, and all private names of torch."""
