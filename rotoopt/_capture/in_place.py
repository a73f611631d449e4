"""Heads that change what they get in place: z is shared, so these must get a copy of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rotoopt._capture.places import Place
from rotoopt._torch.private import version

Key = tuple[int, Place]  # the task, and where the tensor enters


class InPlaceHeads:
    """Finds out at first use whether a head changes what it gets in place."""

    def __init__(self) -> None:
        self._changes: dict[Key, bool] = {}
        self._probes: dict[Key, tuple[Tensor, int]] = {}  # what it got first, and how often that had been changed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_probes": {}}

    def may_change(self, key: Key) -> bool:
        """Whether the head changes what it gets, or nobody knows yet."""
        return self._changes.get(key) is not False

    def own_copy(self, rep: Tensor, key: Key) -> Tensor:
        """Return a copy of ``rep`` for a head that changes what it gets, else ``rep``; at first, look which it is."""
        if key not in self._changes and key in self._probes:
            probe, count = self._probes.pop(key)
            self._changes[key] = version(probe) > count
        if not self.may_change(key):
            return rep
        copy = rep.clone()
        if key not in self._changes:
            self._probes[key] = copy.detach(), version(copy)  # which share the count of changes
        return copy
