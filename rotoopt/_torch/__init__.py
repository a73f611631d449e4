"""Being an optimizer of torch: the wrapper, processes, devices, checkpoints, and every private name of torch."""
