"""The record of a step: measurements for monitoring."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotoopt._rotation.cayley import orthogonality_error
from rotoopt._rotation.rotations import Rotations

if TYPE_CHECKING:
    from rotoopt._capture.backward_pass import BackwardPass
    from rotoopt._engine.memory import Memory


def alignment(cosines: Tensor, finite: Tensor) -> Tensor:
    """Return the cosine of each gradient with the mean of the unit gradients, NaN where ``finite`` is False.

    ``(..., K, K)`` and ``(...)`` to ``(..., K)``.
    """
    length = cosines.mean(dim=(-2, -1)).clamp(min=0.0).sqrt()[..., None]
    return torch.where(finite[..., None], torch.where(length > 0, cosines.mean(dim=-1) / length, 0.0), torch.nan)


def conflict_rate(cosines: Tensor, present: Tensor, finite: Tensor) -> Tensor:
    """Return the share of negative cosines between present tasks, NaN where ``finite`` is False.

    ``(..., K, K)``, ``(..., K)`` and ``(...)`` to ``(...)``.
    """
    num_present = present.sum(dim=-1)
    rate = (cosines < 0).sum(dim=(-2, -1)) / (num_present * (num_present - 1)).clamp(min=1)
    return torch.where(finite, rate, torch.nan)


@dataclass(frozen=True)
class StepRecord:
    """Measurements of the latest backward pass and the step after it.

    All tensors are detached and stay on their device: there is no synchronization until a number is read.

    Attributes:
        step: Number of steps before this one.
        losses: L_k, NaN for an absent task; ``None`` if the user called ``backward()`` on them. Shape ``(K,)``.
        grad_norms: ||G_k||, the norm of the gradient at the representation (all tensors that enter the head) over the
            whole batch, zero for an absent task. Shape ``(K,)``.
        weights: The task weights that were used, zero for an absent task, NaN for a callable weighting. Shape ``(K,)``.
        lagged: Whether these weights were computed in the step before: because the weighting is lagged, or because the
            heads read several tensors, whose gradients cannot be collected.
        cosines: Cosines between the task gradients, zero for an absent or zero one, and for tasks whose heads read
            different tensors. If the weights are known before the backward pass, gradients are only collected in every
            ``turn_every``-th step: then the cosines of the latest of these. Shape ``(K, K)``.
        present: Which tasks are present. Shape ``(K,)``, bool.
        finite: Whether all losses and gradients were finite; if not, rotations, references and trained weights
            were not changed. Shape ``()``, bool.
        angles: Angle by which this step turned each rotation, in radians, root mean square over all vectors; zero
            before ``step()``, and in steps without an update of the rotations. Shape ``(K,)``.
        total_angles: The sum of ``angles`` since the start: the length of the path, not its distance. Shape ``(K,)``.
        rotation_lr: Learning rate of the rotations; NaN before ``step()``, or if the user's optimizer updates them.
        rotations: The current rotations.
    """

    step: int
    losses: Tensor | None
    grad_norms: Tensor
    weights: Tensor
    lagged: bool
    cosines: Tensor
    present: Tensor
    finite: Tensor
    angles: Tensor
    total_angles: Tensor
    rotation_lr: float | Tensor
    rotations: Rotations = field(repr=False)

    @classmethod
    def of(
        cls,
        this: BackwardPass,
        memory: Memory,
        rotations: Rotations,
        previous: StepRecord | None,
        *,
        begun: bool = False,
    ) -> StepRecord:
        """Return the record of a closed backward pass.

        Args:
            this: The backward pass.
            memory: The state of the method.
            rotations: The rotations.
            previous: The record of the previous backward pass.
            begun: Whether that belongs to the same step: then absent tasks keep their measurements from it.
        """
        measured, weights = this.measured, this.weights
        assert measured is not None
        assert weights is not None
        losses, present = measured.losses, measured.present
        norms = measured.norms
        if len(this.tasks) < len(norms):
            norms, weights = (each.masked_fill(~present, 0.0) for each in (norms, weights))
        if begun and previous is not None:
            norms = torch.where(present, norms, previous.grad_norms)
            weights = torch.where(present, weights, previous.weights)
            losses = (
                None if losses is None or previous.losses is None else torch.where(present, losses, previous.losses)
            )
            present = present | previous.present
        cosines = measured.cosines
        if cosines is None and previous is not None:
            cosines = previous.cosines.to(weights.device)
        elif cosines is None:
            cosines = torch.full_like(weights.outer(weights), torch.nan)
        return cls(
            step=memory.num_steps,
            losses=losses,
            grad_norms=norms,
            weights=weights,
            lagged=this.lagged,
            cosines=cosines,
            present=present,
            finite=measured.finite,
            angles=memory.rest,
            total_angles=memory.total_angles,
            rotation_lr=math.nan,
            rotations=rotations,
        )

    @cached_property
    def alignment(self) -> Tensor:
        """Cosine of each task gradient with the mean of the unit gradients, the target. Shape ``(K,)``.

        Zero for an absent task; NaN for all if a loss or gradient was not finite.
        """
        return alignment(self.cosines, self.finite)

    @cached_property
    def conflict_rate(self) -> Tensor:
        """Share of the pairs of present tasks whose gradients have a negative cosine; 0 for one task. Shape ``()``.

        NaN if a loss or gradient was not finite.
        """
        return conflict_rate(self.cosines, self.present, self.finite)

    @property
    def orthogonality_error(self) -> Tensor:
        r"""Largest entry of :math:`|R_k^\top R_k - I|` of every current rotation. Shape ``(K,)``.

        Computed when it is read, with K products of ``(m, m)`` matrices.
        """
        return orthogonality_error(self.rotations.matrices)
