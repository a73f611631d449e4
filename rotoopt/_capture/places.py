"""Places: which of the tensors that enter the heads are rotated."""

from __future__ import annotations

import torch
from torch import Tensor

from rotoopt._capture.representation import RotatedDims
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.private import is_transformed, not_compiled

# A module of a task, by number, and a path through its arguments, lists and dicts.
Place = tuple[int, str]
Z = "z"  # the path of z in head(z)


class Places:
    """Which of the tensors that enter the heads are rotated: those of the size of the rotations.

    That is noted in training, where a tensor enters with a gradient, and holds in evaluation.

    Args:
        rotations: The K rotations.
        dims: The rotated dimensions.

    Attributes:
        noted: By task, the places that were noted, and whether they are rotated.
    """

    def __init__(self, rotations: Rotations, dims: RotatedDims) -> None:
        self._rotations = rotations
        self._dims = dims
        self.noted: list[dict[Place, bool]] = [{} for _ in range(len(rotations))]

    def matrix_for(self, rep: Tensor, task: int, place: Place, *, note: bool) -> Tensor | None:
        """Return R_k if ``rep`` is rotated, None if it is not; make the rotations where this is the first one.

        Args:
            rep: What enters the head.
            task: k.
            place: Where it enters.
            note: Whether to note what holds for this place.
        """
        if not self._rotations.rotate[task]:
            if not any(self._rotations.rotate) and self._rotations.size is None and self._dims.exist_in(rep):
                self._settle(self._dims.size(rep), rep.device)  # to be looked at
            return None
        fits = self.noted[task].get(place)
        if fits is None and (note or place[1] == Z):
            fits = self._fits(rep, place)
            if note:
                self.noted[task][place] = fits
        elif fits and not self._fits(rep, place):
            raise ValueError(self._misfit(rep))
        if not fits:
            return None
        if self._rotations.size is None or rep.device != self._rotations.device:
            self._settle(self._dims.size(rep), rep.device)
        return self._rotations[task]

    def note_same(self, place: Place, as_: Place, task: int) -> None:
        """Note that what enters at ``place`` is what enters at ``as_``."""
        if as_ in self.noted[task]:
            self.noted[task][place] = self.noted[task][as_]

    def _fits(self, rep: Tensor, place: Place) -> bool:
        """Whether ``rep`` has the size of the rotations. The first z must have it, or decides about it."""
        is_first = not any(any(noted.values()) for noted in self.noted) and (place[1] == Z or rep.ndim > 1)
        if not is_first and not self._dims.exist_in(rep):
            return False
        d, m = self._dims.size(rep), self._rotations.size
        fits = is_first if m is None else d == m if self._rotations.covers_all else d >= m
        if is_first and not fits:
            raise ValueError(self._misfit(rep))
        return fits

    def _misfit(self, rep: Tensor) -> str:
        m = self._rotations.size
        rule = f"have {m} features" if self._rotations.covers_all else f"have at least rotation_size={m} features"
        return (
            f"The representation must {rule} along dim={self._dims.dim}, got {self._dims.size(rep)} in shape "
            f"{tuple(rep.shape)}. Either (a) `dim` names the wrong dimension, (b) the head was fed something else than "
            "the representation, or (c) its size changes between batches: rotate a dimension that does not."
        )

    @not_compiled
    def _settle(self, size: int, device: torch.device) -> None:
        """Make the rotations at the first representation; follow a model that was moved."""
        if is_transformed():
            raise RuntimeError(
                "The rotations must exist on the device of the model before it is exported, traced or transformed by "
                "torch.func, got none there. They are made, or moved, when the model runs: run it once before."
            )
        with torch.inference_mode(False):  # a check before training may be the first forward pass
            self._rotations.to(device)
            if self._rotations.size is None:
                self._rotations.create(size)

    def state_dict(self) -> list[dict[Place, bool]]:
        """Return what was noted."""
        return [dict(noted) for noted in self.noted]

    def load_state_dict(self, noted: list[dict[Place, bool]]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.noted = [dict(each) for each in noted]
