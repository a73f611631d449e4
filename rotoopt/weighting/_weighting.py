"""Weightings: the base class, the paper's, and equal weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rotoopt.weighting._gradients import TaskGradients
from rotoopt.weighting._measurements import Measurements


class Weighting(ABC):
    """Base class: computes one weight per task from measurements. Subclasses implement :meth:`__call__`.

    By default, the weights of a backward pass are computed in that pass: the K gradients are collected at the
    representation, their norms are measured, and their weighted sum is passed on to the backbone. If the heads do not
    all read one tensor, the gradients cannot be collected: then all weightings are lagged, and the first weights are
    one.

    Attributes:
        lagged: Whether the weights are used from the next step on, and so are known before its backward pass. Then
            each gradient is weighted as soon as it is available, and none is stored. The weights of the first step
            are one.
        num_waiting: Number of first steps of a lagged weighting that use weights from their own gradients, if all
            heads read one tensor; otherwise these weights are one.
        needs_losses: Whether the losses are needed. Then ``sum(losses).backward()`` raises an error that asks for
            ``optimizer.step(losses)`` or ``optimizer.backward(losses)``.
        needs_cosines: Whether the K gradients must be collected in every step to compute their cosines.
        needs_agreement: Whether to measure :attr:`Measurements.agreement`: in the steps that update the rotations, and
            for a task that is absent there in one of the next K - 1. It is available one step later.
        needs_references: Whether :attr:`Measurements.norm_references`, :attr:`Measurements.loss_references` or the
            norms of absent tasks are used; otherwise all of them may be unknown.
        needs_one_tensor: Whether all heads must read one tensor, because :meth:`combine` is not a weighted sum.
        state: State of the weighting: tensors by name, saved and loaded with the optimizer and moved to the device of
            the representation. Initially empty.
    """

    lagged: bool = False
    num_waiting: int = 0
    needs_losses: bool = False
    needs_cosines: bool = False
    needs_agreement: bool = False
    needs_references: bool = True
    needs_one_tensor: bool = False
    _bound: bool = False

    @abstractmethod
    def __call__(self, measured: Measurements) -> Tensor:
        """Return the weights of the tasks; those of absent tasks are ignored. Shape ``(K,)``.

        Called without gradients and outside of autocast: once per backward pass or, if ``lagged``, once per step with
        the joint measurements of its backward passes, except those with a value that is not finite.

        Args:
            measured: The measurements, float32 (float64 for float64 representations), on the device of the
                representation.
        """

    @property
    def remaining(self) -> Tensor | None:
        """Factors of built-in updates of the rotations, small for converged tasks; ``None``: one. Shape ``(K,)``."""
        return None

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """State of the weighting: tensors by name."""
        return {}

    def bind(self, num_tasks: int, device: torch.device, dtype: torch.dtype) -> None:
        """Create the state for ``num_tasks`` tasks; called once, by the optimizer that uses this weighting.

        Raises:
            ValueError: If another optimizer uses it already.
        """
        if self._bound:
            raise ValueError(
                f"`weighting` must not be shared between optimizers, got a {type(self).__name__} that another one "
                f"uses. Make a new {type(self).__name__} for this one."
            )
        self._bound = True

    def release(self) -> None:
        """Let another optimizer use this weighting, after the one that called :meth:`bind` could not be built."""
        self._bound = False

    def combine(self, gradients: TaskGradients, weights: Tensor) -> Tensor:
        r"""Return :math:`\sum_k w_k G_k` with ``weights`` w, finite. Shape ``(n,)``."""
        return gradients.combine(weights)

    def to(self, device: torch.device) -> None:
        """Move the state to ``device``."""
        for name, tensor in self.state.items():
            self.state[name] = tensor.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return what must be saved to resume."""
        return {name: tensor.clone() for name, tensor in self.state.items()}

    def load_state_dict(self, state_dict: dict[str, Any], like: Tensor) -> None:
        """Load what :meth:`state_dict` returned, onto the device of ``like``."""
        self.state.clear()
        self.state.update({name: tensor.to(like.device, copy=True) for name, tensor in state_dict.items()})

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def gradient_shares(norm_ratios: Tensor, present: Tensor) -> Tensor:
    r"""Share of every task in the common norm: tasks that converge slowly have a larger share.

    :math:`\alpha_k = \rho_k / \sum_{i \in P} \rho_i` with :math:`\rho_k = \lVert G_k \rVert / \lVert G_k(t_0) \rVert`
    over the present tasks P. A present task without a ratio gets the mean ratio of the others.

    Args:
        norm_ratios: :math:`\rho`. Shape ``(K,)``, NaN where unknown.
        present: P. Shape ``(K,)``, bool.

    Returns:
        Shares that sum to one; zero for absent tasks. Shape ``(K,)``.

    Example:
        >>> gradient_shares(torch.tensor([3.0, 1.0]), torch.tensor([True, True]))
        tensor([0.7500, 0.2500])

    Source: RotoGrad, ICLR 2022, eq. 2.
    """
    known = present & ~norm_ratios.isnan()
    # Ratios may be huge, even infinite, if a gradient has exploded since t0: divide before adding.
    ratios = torch.where(known, norm_ratios, 0.0).clamp(max=torch.finfo(norm_ratios.dtype).max)
    ratios = ratios / ratios.amax()
    ratios = torch.where(present & ~known, ratios.sum() / known.sum(), ratios)
    total = ratios.sum()  # NaN where all ratios are zero, or none is known
    return torch.where(total > 0, ratios / total, present.to(ratios.dtype) / present.sum())


class RotoGradWeighting(Weighting):
    r"""Give all task gradients the same norm C, a convex combination of their norms (the paper's scaling).

    .. math:: w_k = C / \lVert G_k \rVert, \qquad C = \sum_k \alpha_k \lVert G_k \rVert

    with the shares :math:`\alpha_k` of :func:`~rotoopt.weighting.gradient_shares`. The combination is the sum
    :math:`\sum_k w_k G_k` over the present tasks, without a factor 1/K. Absent tasks count in C with their last known
    norms, so that a batch per task is scaled like a batch with all of them. A zero gradient stays zero.

    Source: RotoGrad, ICLR 2022, eqs. 1-2.
    """

    def __call__(self, measured: Measurements) -> Tensor:
        """Return w."""
        norms = measured.norms
        known = measured.present | (norms > 0)
        common_norm = (gradient_shares(measured.norm_ratios, known) * norms).sum()
        # Clamped if norms differ by more than 38 orders of magnitude; the task then gets less than C, but no infinity.
        weights = (common_norm / norms).clamp(max=torch.finfo(norms.dtype).max)
        return torch.where(norms == 0, torch.where(known, 0.0, 1.0), weights)


class EqualWeighting(Weighting):
    """Sum of the gradients, as in ``sum(losses).backward()``: only the rotations have an effect."""

    lagged = True

    def __call__(self, measured: Measurements) -> Tensor:
        """Return ones."""
        return torch.ones_like(measured.norms)
