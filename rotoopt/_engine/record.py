"""The record of a step: what the method measured on the way, for those who want to look."""

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
    """What the latest backward pass and the step after it measured.

    All tensors are detached and stay on their device: nothing waits for a GPU until a number is read.

    Attributes:
        step: Number of steps before this one.
        losses: L_k, NaN for an absent task; ``None`` where the user back-propagated them. Shape ``(K,)``.
        grad_norms: ||G_k||, the norm of the gradient at the representation (all tensors that enter the head, together)
            over the whole batch, zero for an absent task. Shape ``(K,)``.
        weights: The task weights that were used, zero for an absent task, NaN for a callable weighting. Shape ``(K,)``.
        lagged: Whether these weights were made by the step before: the gradients could not wait for each other, since
            the heads read several tensors, or the weighting asks for it.
        cosines: Cosines between the task gradients, zero for an absent or zero one. Where the weights are known before
            the backward pass, gradients meet in every ``turn_every``-th step only: then those of the latest of these
            steps. Shape ``(K, K)``.
        present: Which tasks took part. Shape ``(K,)``, bool.
        finite: Whether all losses and gradients were finite; if not, rotations, references and trained weights
            were left as they were. Shape ``()``, bool.
        angles: By how much this step turned each rotation, in radians, root mean square over all vectors; zero before
            ``step()``, and in the steps in which rotations rest. Shape ``(K,)``.
        total_angles: The sum of ``angles`` since the start: the length of the way, not how far it led. Shape ``(K,)``.
        rotation_lr: Learning rate of the rotations; NaN before ``step()``, or if they have no optimizer here.
        rotations: The rotations themselves, as they are now.
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
        """Return the record of a backward pass that is closed.

        Args:
            this: The backward pass.
            memory: What is remembered.
            rotations: The rotations.
            previous: The record of the backward pass before.
            begun: Whether that was one of the same step: then tasks that are absent now keep what it has of them.
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

        Zero for an absent task; NaN for all where not all losses and gradients were finite.
        """
        return alignment(self.cosines, self.finite)

    @cached_property
    def conflict_rate(self) -> Tensor:
        """Share of the pairs of present tasks whose gradients have a negative cosine; 0 for one task. Shape ``()``.

        NaN where not all losses and gradients were finite.
        """
        return conflict_rate(self.cosines, self.present, self.finite)

    @property
    def orthogonality_error(self) -> Tensor:
        r"""Largest entry of :math:`|R_k^\top R_k - I|` of every rotation, as it is now. Shape ``(K,)``.

        Computed when it is read: K products of ``(m, m)`` matrices.
        """
        return orthogonality_error(self.rotations.matrices)
