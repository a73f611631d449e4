"""Averages of the model that were made before there were rotations for them to copy."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from rotoopt._capture.hooks import hook_of
from rotoopt._torch.warn import warn_user


def warn_of_averages(heads: Sequence[Sequence[nn.Module]]) -> None:
    """Warn if there is an ``AveragedModel`` of the model whose heads have no rotations.

    Nothing leads from a model to its averages, but every object refers to its class.
    """
    modules = [module for each in heads for module in each]
    for averaged in gc.get_referrers(AveragedModel):
        if not isinstance(averaged, AveragedModel):
            continue
        if any(_is_bare_copy(part, module) for part in averaged.modules() for module in modules):
            warn_user(
                "An average of the model must be made after the optimizer, got an AveragedModel from before it: it has "
                "no rotations in front of its heads, and once those of the model have turned, its predictions are "
                "wrong. Call AveragedModel(model) again, and optimizer.refresh(averaged) before it is used."
            )
            return


def _is_bare_copy(part: nn.Module, head: nn.Module) -> bool:
    if type(part) is not type(head) or hook_of(part) is not None:
        return False
    pairs = list(zip(part.parameters(), head.parameters(), strict=False))
    return bool(pairs) and all(ours.shape == own.shape and torch.equal(ours.to(own), own) for ours, own in pairs)
