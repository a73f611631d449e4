"""The module inside of what torch puts around one."""

from __future__ import annotations

from torch import nn


def unwrapped(module: nn.Module) -> nn.Module:
    """Return ``module`` without torch.compile and DistributedDataParallel around it, which change its names."""
    inner = getattr(module, "_orig_mod", None)
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = module.module
    return unwrapped(inner) if isinstance(inner, nn.Module) else module
