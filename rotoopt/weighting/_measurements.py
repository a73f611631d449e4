"""Measurements: the input of a weighting, from one backward pass or all of one step, and the reference values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rotoopt._torch.processes import Processes


@dataclass(frozen=True)
class Measurements:
    r"""The norms of K task gradients, the losses, and the references of both.

    Attributes:
        norms: :math:`\lVert G_k \rVert`, the norm of the gradient of task k at the representation over the whole batch;
            for an absent task the last known norm, or zero if there is none. Shape ``(K,)``.
        present: Which tasks are present. Shape ``(K,)``, bool. For a weighting that is called once per step, False
            for all tasks if a value was not finite.
        finite: Whether all losses and gradients were finite; if not, do not update any state. Shape ``()``, bool.
        losses: L_k, NaN for an absent task. Shape ``(K,)``. ``None`` if the user called ``backward()`` on them.
        cosines: Cosines between the gradients, zero for an absent or zero one. Shape ``(K, K)``. ``None`` if the
            gradients were not collected: see :attr:`Weighting.needs_cosines`.
        norm_references: :math:`\lVert G_k(t_0) \rVert`, NaN where there is none yet. Shape ``(K,)``.
        loss_references: :math:`|L_k(t_0)|`, NaN where there is none yet. Shape ``(K,)``.
        agreement: How much the gradients of the samples in the batch before agreed: with
            :math:`A_{kb} = g_{kb} z_b^\top`, the gradient of sample b with respect to a matrix in front of head k,
            :math:`\lVert \sum_b A_{kb} \rVert^2 / \sum_b \lVert A_{kb} \rVert^2`. Its expectation is one for a gradient
            that is pure noise; it is the number of samples if all are equal; NaN for a task absent there. Estimated
            from 64 random projections. Shape ``(K,)``. ``None`` if it was not measured: see
            :attr:`Weighting.needs_agreement`.
        burnt_in: Whether the burn-in is over.
    """

    norms: Tensor
    present: Tensor
    finite: Tensor
    losses: Tensor | None
    cosines: Tensor | None
    norm_references: Tensor
    loss_references: Tensor
    agreement: Tensor | None = None
    burnt_in: bool = True

    @cached_property
    def norm_ratios(self) -> Tensor:
        r""":math:`\lVert G_k \rVert / \lVert G_k(t_0) \rVert`, NaN without a reference. Shape ``(K,)``."""
        return self.norms / self.norm_references

    @cached_property
    def loss_ratios(self) -> Tensor | None:
        """:math:`L_k / |L_k(t_0)|`, L_k without a reference, NaN for an absent task; None without losses. ``(K,)``."""
        if self.losses is None:
            return None
        return self.losses / torch.where(self.loss_references.isnan(), 1.0, self.loss_references)


def joined(parts: Sequence[Measurements]) -> Measurements:
    """Return the joint measurements of several backward passes, without those that are not finite.

    Squared norms and losses are added: each loss is that of a part of the batch, divided by the number of parts.
    """
    usable = [_if_finite(part) for part in parts]
    if len(usable) == 1:
        return usable[0]
    norms = torch.stack([part.norms for part in usable])  # (T, K)
    present = torch.stack([part.present for part in usable])
    losses, cosines = _stacked([part.losses for part in usable]), _stacked([part.cosines for part in usable])
    total = root_sum_square(norms)
    if losses is not None:  # NaN for a task that is absent on all processes
        losses = torch.where(losses.isnan().all(0), torch.nan, losses.nansum(0))
    if cosines is not None:
        cosines = _joint_cosines(cosines, norms, total)
    finite = torch.stack([part.finite for part in usable]).any()
    return replace(usable[-1], norms=total, present=present.any(0), finite=finite, losses=losses, cosines=cosines)


def joined_across(own: Measurements, processes: Processes) -> Measurements:
    """Return the joint measurements of all processes.

    The losses already are those of all, but a backward pass may be left out on a process where a gradient was not
    finite: all use those of the first process.
    """
    K, none = len(own.norms), own.norms.new_zeros(0)
    losses = none if own.losses is None else own.losses
    cosines = none if own.cosines is None else own.cosines.flatten()
    gathered = processes.gather(torch.cat([own.norms, own.present, own.finite[None], losses, cosines]))
    norms, present, finite, values, parts = torch.split(gathered, [K, K, 1, len(losses), len(cosines)], dim=1)
    total = root_sum_square(norms)
    return replace(
        own,
        norms=total,
        present=present.any(0),
        finite=finite.all(),
        losses=None if own.losses is None else values[0].to(own.losses),
        cosines=None if own.cosines is None else _joint_cosines(parts.view(-1, K, K), norms, total),
    )


def _if_finite(part: Measurements) -> Measurements:
    """Return ``part`` with norm zero for absent tasks; all tasks are absent if a value was not finite."""
    finite = part.finite
    present = part.present & finite
    return replace(
        part,
        norms=part.norms.masked_fill(~present, 0.0),
        present=present,
        losses=None if part.losses is None else part.losses.masked_fill(~finite, torch.nan),
        cosines=None if part.cosines is None else torch.where(finite, part.cosines, 0.0),
    )


def _joint_cosines(cosines: Tensor, norms: Tensor, total: Tensor) -> Tensor:
    """Return the cosines of vectors with norms ``total`` whose parts have ``norms``. ``(T, K, K)`` to ``(K, K)``."""
    shares = torch.where(total > 0, norms / total, 0.0)
    return (shares[:, :, None] * cosines * shares[:, None, :]).sum(0)


def root_sum_square(norms: Tensor) -> Tensor:
    """Return the norms of vectors whose parts have ``norms``, ``(T, K)``, at any scale. Shape ``(K,)``."""
    largest = norms.amax(0)
    relative = torch.where(largest > 0, norms / largest, 0.0)
    return largest * relative.square().sum(0).sqrt()


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    known = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(known) if len(known) == len(tensors) else None


@dataclass(frozen=True)
class Reference:
    """One reference value per task, measured at step 0 and again after the burn-in.

    A reference must be a finite, nonzero value of a present task. If the value at step 0 (or at the end of the
    burn-in) is not, the next valid one is taken. Until the burn-in ends, a reference at rounding level relative to the
    current value is replaced: a distillation loss starts at zero, plus or minus rounding errors.

    Attributes:
        values: The references, NaN where there is none yet. Shape ``(K,)``.
        settled: Whether the reference was measured after the burn-in, and is final. Shape ``(K,)``, bool.

    Source: RotoGrad, ICLR 2022, eq. 2 uses t0 = 0; the second measurement is from the official code, which accepts
    any value: there, one overflow at step 0 zeroes the gradient of the backbone until the burn-in ends.
    """

    values: Tensor
    settled: Tensor

    @classmethod
    def unknown(cls, num_tasks: int, device: torch.device, dtype: torch.dtype) -> Reference:
        """Return references that are all unknown."""
        values = torch.full((num_tasks,), float("nan"), device=device, dtype=dtype)
        return cls(values, torch.zeros(num_tasks, dtype=torch.bool, device=device))

    def updated(self, current: Tensor, finite: Tensor, *, burnt_in: bool) -> Reference:
        """Return the references after a step.

        Args:
            current: Absolute values of this step; zero or NaN for a task without a value. Shape ``(K,)``.
            finite: Whether they are finite, for all tasks or for each. Shape ``()`` or ``(K,)``, bool.
            burnt_in: Whether the burn-in is over.
        """
        valid = (current > 0) & finite
        if burnt_in:
            take = valid > self.settled  # valid and not settled
        else:
            take = valid > (self.values >= current * torch.finfo(self.values.dtype).eps ** 0.5)  # NaN, too
        values = torch.where(take, current.to(self.values.dtype), self.values)
        return Reference(values, self.settled | valid if burnt_in else self.settled)

    def known_or_one(self) -> Tensor:
        """Return the references, and one where there is none. Shape ``(K,)``."""
        return torch.where(self.values.isnan(), 1.0, self.values)

    def to(self, device: torch.device) -> Reference:
        """Return these references on ``device``."""
        return Reference(self.values.to(device), self.settled.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the tensors."""
        return {"values": self.values.clone(), "settled": self.settled.clone()}

    def loaded(self, state_dict: dict[str, Tensor]) -> Reference:
        """Return the references of ``state_dict`` on this one's device."""
        return Reference(
            state_dict["values"].to(self.values, copy=True),
            state_dict["settled"].to(self.settled, copy=True),
        )
