"""Modules and optimizers: those that exist, wrappers of torch around a module, and the mode of each submodule."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from rotoopt._torch.private import compiled_module, without_compiled_prefixes

MOST_NAMED = 3


class ForwardHook:
    """A forward hook, which torch.jit.script cannot compile."""

    @property
    def __name__(self) -> str:
        """Missing, and read by torch.jit.script only."""
        raise AttributeError(
            "torch.jit.script() does not support the hooks of heads. Call optimizer.fold() first, to merge the "
            "rotations into the weights, or use torch.export.export()."
        )


def unwrapped(module: nn.Module) -> nn.Module:
    """Return ``module`` without torch.compile and DistributedDataParallel around it, which change its names."""
    inner = compiled_module(module)
    if isinstance(module, (DistributedDataParallel, DataParallel)):  # torch.compile before 2.9 cannot trace `A | B`
        inner = module.module
    return module if inner is None else unwrapped(inner)


def living_modules() -> Iterator[nn.Module]:
    """Return all existing modules."""
    return (each for each in gc.get_objects() if issubclass(type(each), nn.Module))


def living_optimizers() -> Iterator[Optimizer]:
    """Return all existing optimizers, except those whose constructor has not run to its end, or has failed."""
    return (each for each in gc.get_objects() if issubclass(type(each), Optimizer) and hasattr(each, "param_groups"))


def is_trained(leaf: Tensor) -> bool:
    """Whether ``leaf`` is a parameter, not an input that requires grad; slow for an input."""
    if isinstance(leaf, nn.Parameter):
        return True
    groups = (group for each in living_optimizers() for group in each.param_groups)
    return any(leaf is param for group in groups for param in group["params"])


def trained_with(keys: Set[int]) -> set[int]:
    """Return the ids of all parameters of optimizers that have one of those with the ids ``keys``; slow."""
    of_each = ({id(param) for group in each.param_groups for param in group["params"]} for each in living_optimizers())
    return {key for params in of_each if not params.isdisjoint(keys) for key in params}


def names_of(params: Sequence[Tensor]) -> str:
    """Return the names and shapes of the first of ``params``, in the order of their optimizer; slow, for errors.

    A parameter has the longest of its names in modules.
    """
    names, places = {id(param): "" for param in params}, {id(param): sys.maxsize for param in params}
    for module in living_modules():
        for name, param in _named_parameters(module):
            if id(param) in names:
                names[id(param)] = max(names[id(param)], without_compiled_prefixes(name), key=lambda n: (len(n), n))
    for optimizer in living_optimizers():
        for place, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
            if id(param) in places:
                places[id(param)] = min(places[id(param)], place)
    ordered = sorted(params, key=lambda param: (places[id(param)], names[id(param)]))
    named = [f"{names[id(param)] or 'a parameter'} of shape {tuple(param.shape)}" for param in ordered[:MOST_NAMED]]
    return ", ".join(named) + (f" and {len(params) - MOST_NAMED} more" if len(params) > MOST_NAMED else "")


def _named_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    try:
        return list(module.named_parameters())
    except AttributeError:  # its __init__ has not run yet
        return []


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode temporarily; afterwards every submodule has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
