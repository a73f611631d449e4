"""Modules: what torch puts around one, and the mode that each part of one is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rotoopt._torch.private import compiled_module


def unwrapped(module: nn.Module) -> nn.Module:
    """Return ``module`` without torch.compile and DistributedDataParallel around it, which change its names."""
    inner = compiled_module(module)
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = module.module
    return module if inner is None else unwrapped(inner)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Have ``model`` in eval mode, and every part of it in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
