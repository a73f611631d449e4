"""Heads that change their input in place: z is shared, so they must get a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotoopt._capture.places import Place
from rotoopt._torch.private import version

Key = tuple[int, Place]  # the task, and where the tensor enters


class InPlaceHeads:
    """Detects in the first call whether a head changes its input in place."""

    def __init__(self) -> None:
        self._changes: dict[Key, bool] = {}
        self._probes: dict[Key, tuple[Tensor, int]] = {}  # the first input, and its version counter

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_probes": {}}

    def may_change(self, key: Key) -> bool:
        """Whether the head changes its input, or it is not known yet."""
        return self._changes.get(key) is not False

    @property
    def tasks(self) -> set[int]:
        """The tasks of heads that change an input."""
        changed = {key for key, changes in self._changes.items() if changes}
        changed |= {key for key, (probe, count) in self._probes.items() if version(probe) > count}
        return {task for task, _ in changed}

    def own_copy(self, rep: Tensor, key: Key) -> Tensor:
        """Return a copy of ``rep`` for a head that changes its input, otherwise ``rep``; the first call detects it."""
        if key not in self._changes and key in self._probes:
            probe, count = self._probes.pop(key)
            self._changes[key] = version(probe) > count
        if not self.may_change(key):
            return rep
        copy = copied(rep)
        if copy is not rep and key not in self._changes:
            self._probes[key] = copy.detach(), version(copy)  # both share the version counter
        return copy


def copied(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides, since layers would compute another layout differently.

    If entries share memory, as after ``expand``, return ``tensor`` itself: torch cannot change it in place.
    """
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return tensor
    copy = tensor.clone()
    return (
        copy
        if copy.stride() == tensor.stride()
        else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    )
