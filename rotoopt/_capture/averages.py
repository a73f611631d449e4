"""Averages of the model that were created before it had rotations to copy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from rotoopt._capture.hooks import hook_of
from rotoopt._torch.warn import warn_user

NAMES = re.compile(r"Averag|EMA|Ema(?![a-z])")  # AveragedModel of torch, ModelEmaV3 of timm, EMA of ema-pytorch
averages: WeakSet[nn.Module] = WeakSet()


def _note(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if NAMES.search(type(module).__name__):
        averages.add(module)


# A model has no references to its averages: they are recorded when they copy it.
register_module_module_registration_hook(_note)


def warn_of_averages(heads: Sequence[Sequence[nn.Module]]) -> None:
    """Warn if there is a running average of the model whose heads have no rotations."""
    modules = [module for each in heads for module in each]
    for averaged in averages:
        if any(_is_bare_copy(part, module) for part in averaged.modules() for module in modules):
            warn_user(
                f"An average of the model must be created after the optimizer, got a {type(averaged).__name__} from "
                "before it: it has no rotations in front of its heads, so its predictions are wrong once those of the "
                "model are updated. Create it again, and call optimizer.refresh(averaged) before using it."
            )
            return


def _is_bare_copy(part: nn.Module, head: nn.Module) -> bool:
    if type(part) is not type(head) or hook_of(part) is not None:
        return False
    pairs = list(zip(part.parameters(), head.parameters(), strict=False))
    return bool(pairs) and all(ours.shape == own.shape and torch.equal(ours.to(own), own) for ours, own in pairs)
