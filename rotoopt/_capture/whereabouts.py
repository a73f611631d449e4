"""Whereabouts: is a rotation still the one that the weights behind it were trained with?"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt._capture.places import Places
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.private import version

ENTRY = "rotoopt"  # in the metadata of a module in a state dict

LOST = (
    "Weights of a head should be loaded with the rotation that they were trained with, got a state dict without, after "
    "the rotations had turned. Predictions differ from those of the model that was saved. Either (a) only its items "
    "were kept, or changed: copy.deepcopy(model.state_dict()) has the rotations, or (b) the state of the optimizer was "
    "not loaded: optimizer.load_state_dict(...)."
)
STALE = (
    "A copy of the model should have the rotations that its weights were trained with, got one whose weights have "
    "changed since, and its rotations have not, while those of the model turned. Predictions differ from what the copy "
    "stands for. Call optimizer.refresh(model_copy) after its weights were brought up to date, or "
    "model_copy.load_state_dict(model.state_dict())."
)


class Whereabouts:
    """Sends the rotations where the weights of their heads go, and says whether they have come from there.

    Args:
        rotations: The K rotations.
        places: Where they are applied.
    """

    def __init__(self, rotations: Rotations, places: Places) -> None:
        self._rotations = rotations
        self._places = places
        self._loaded: int | None = None

    def saved(self, task: int, part: int) -> dict[str, Any]:
        """Return what belongs to the weights of a module of a head: its rotation, None for I, and where it rotates."""
        matrix = self._rotations[task].clone() if self._rotations.is_turned(task) else None
        noted = self._places.noted[task].items()
        return {"rotation": matrix, "places": {path: fits for (number, path), fits in noted if number == part}}

    def load(self, task: int, part: int, saved: dict[str, Any]) -> str | None:
        """Load what :meth:`saved` returned; return why not, where it does not fit."""
        matrix, rotations = saved["rotation"], self._rotations
        if matrix is not None and not rotations.rotate[task]:
            return "the weights need a rotation, and the task has rotate=False."
        if matrix is not None and rotations.size not in (None, len(matrix)):
            return f"the weights need a rotation of {len(matrix)} features, and those here have {rotations.size}."
        if matrix is None and rotations.size is not None:
            matrix = torch.eye(rotations.size)
        if matrix is not None:
            rotations.load_matrix(task, matrix)
        self._places.noted[task].update({(part, path): fits for path, fits in saved["places"].items()})
        return None

    def mark_as_loaded(self) -> None:
        """Note that the rotations are those of weights that were, or will be, loaded beside them."""
        self._loaded = changes_of(self._rotations)

    def are_lost(self, task: int) -> bool:
        """Whether weights of ``task`` that came without rotation need another one than it has now."""
        return self._loaded != changes_of(self._rotations) and self._rotations.is_turned(task)


def checksum(state_dict: Mapping[str, Any], prefix: str) -> Tensor | None:
    """Return a number for the weights below ``prefix``; None where they are not here. Shape ``()``, int64.

    A sum of bits, which no device and no order of the terms rounds. The metadata of a state dict stays as it was where
    weights are written into it, as averaging and torch.distributed.checkpoint do.
    """
    weights = [each for key, each in state_dict.items() if key.startswith(prefix) and isinstance(each, Tensor)]
    if any(hasattr(each, "to_local") or each.is_meta for each in weights):
        return None
    parts = [_bits(each).sum(dtype=torch.int64).cpu() for each in weights if each.layout == torch.strided]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.int64)


def _bits(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as integers."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if not tensor.is_floating_point() or tensor.itemsize not in kinds:
        return tensor.detach().to(torch.int64)
    return tensor.detach().contiguous().view(kinds[tensor.itemsize])


@dataclass(frozen=True)
class Origin:
    """The rotations of the model that a head was copied from.

    Attributes:
        rotations: These rotations, if they still are.
        turned: How often they had been changed when those of the copy were the same.
        weights: How often the weights of the copy had been changed then.
    """

    rotations: weakref.ref[Rotations]
    turned: int
    weights: int

    @classmethod
    def of(cls, rotations: Rotations) -> Origin:
        """Return the origin of a copy that is being made."""
        return cls(weakref.ref(rotations), changes_of(rotations), 0)

    def renewed(self, head: nn.Module) -> Origin:
        """Return this origin for a copy whose rotations were brought up to date."""
        rotations = self.rotations()
        turned = self.turned if rotations is None else changes_of(rotations)
        return Origin(self.rotations, turned, _changes_of_weights(head))

    def has_moved_on(self, head: nn.Module) -> bool:
        """Whether weights of the copy have changed, and the rotations of the origin, too."""
        rotations = self.rotations()
        if rotations is None or changes_of(rotations) == self.turned:
            return False
        return _changes_of_weights(head) != self.weights


def changes_of(rotations: Rotations) -> int:
    """Return how often ``rotations`` have been changed."""
    return -1 if rotations.size is None else version(rotations.matrices)


def _changes_of_weights(head: nn.Module) -> int:
    return sum(version(param) for param in head.parameters() if not param.is_inference())
