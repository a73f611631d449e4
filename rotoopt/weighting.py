"""Weightings: how the K task gradients at the representation become the one that the backbone receives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotoopt.gradients import TaskGradients

Aggregator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Progress:
    """How far every task has come, relative to its burn-in reference.

    Attributes:
        norm_ratios: ||G_k|| / ||G_k(t0)||, NaN without a reference. Shape ``(K,)``.
        loss_ratios: L_k / |L_k(t0)|, or L_k without a reference. Shape ``(K,)``. ``None`` where the losses were
            back-propagated by the user, who did not show them.
        finite: Whether all losses and gradients are finite. Shape ``()``, bool.
    """

    norm_ratios: Tensor
    loss_ratios: Tensor | None
    finite: Tensor


class Combined(NamedTuple):
    """One gradient made of K: the vector, shape ``(n,)``, and the task weights, shape ``(K,)``."""

    vector: Tensor
    weights: Tensor


class Weighting(ABC):
    """Turns K task gradients into one. Subclass it, or pass any callable ``(K, n) -> (n,)``, for your own."""

    needs_losses = False

    @abstractmethod
    def combine(self, gradients: TaskGradients, progress: Progress) -> Combined:
        """Return the combination, homogeneous of degree one in the gradients.

        Args:
            gradients: The gradients at the representation, with their norms and cosines.
            progress: Ratios of norms and losses to their references.
        """

    def bind(self, num_tasks: int, device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027 - optional, most have no state
        """Make the state for ``num_tasks`` tasks; called once, by the optimizer that uses this weighting."""

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move the state to ``device``."""

    def step(self) -> None:  # noqa: B027
        """Update trained weights; called once per optimizer step, after the gradients were used."""

    def zero_grad(self) -> None:  # noqa: B027
        """Forget gradients of trained weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be saved to resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027
        """Load what :meth:`state_dict` returned."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def gradient_shares(norm_ratios: Tensor, present: Tensor) -> Tensor:
    r"""Share of every task in the common magnitude: tasks that converge slowly count more.

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
    # Ratios of a task whose gradient exploded since t0 may be huge, even infinite: divide before adding up.
    ratios = torch.where(known, norm_ratios, 0.0).clamp(max=torch.finfo(norm_ratios.dtype).max)
    ratios = ratios / ratios.amax()
    ratios = torch.where(present & ~known, ratios.sum() / known.sum(), ratios)
    total = ratios.sum()  # NaN where all ratios are zero, or none is known
    return torch.where(total > 0, ratios / total, present.to(ratios.dtype) / present.sum())


class RotoGradWeighting(Weighting):
    r"""Give all task gradients the same norm C, a convex combination of their norms (the paper's scaling).

    .. math:: w_k = C / \lVert G_k \rVert, \qquad C = \sum_k \alpha_k \lVert G_k \rVert

    with the shares :math:`\alpha_k` of :func:`~rotoopt.weighting.gradient_shares`. The combination is the sum
    :math:`\sum_k w_k G_k` over the present tasks, without a factor 1/K. A zero gradient stays zero.

    Source: RotoGrad, ICLR 2022, eqs. 1-2.
    """

    def combine(self, gradients: TaskGradients, progress: Progress) -> Combined:
        r"""Return :math:`\sum_k w_k G_k` and w."""
        shares = gradient_shares(progress.norm_ratios, gradients.present)
        common_norm = (shares * gradients.norms).sum()
        # Saturates where norms lie more than 38 decades apart; the task then gets less than C, and no infinity.
        weights = (common_norm / gradients.norms).clamp(max=torch.finfo(common_norm.dtype).max)
        weights = torch.where(gradients.norms == 0, 0.0, weights)
        return Combined(gradients.combine(weights), weights)


class EqualWeighting(Weighting):
    """Add the gradients up, as ``sum(losses).backward()`` does: rotations only."""

    def combine(self, gradients: TaskGradients, progress: Progress) -> Combined:
        """Return the sum of the gradients and weights of one."""
        weights = gradients.present.to(gradients.scale.dtype)
        return Combined(gradients.combine(weights), weights)


class CallableWeighting(Weighting):
    """Any function of the ``(|P|, n)`` matrix of present task gradients, such as a TorchJD aggregator.

    Args:
        aggregator: Maps ``(|P|, n)``, float32 (float64 for float64 representations), to ``(n,)``.
    """

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = aggregator

    def combine(self, gradients: TaskGradients, progress: Progress) -> Combined:
        """Return what the aggregator makes of the gradients; its weights are its own business: NaN."""
        return Combined(gradients.aggregate(self._checked), torch.full_like(gradients.scale, float("nan")))

    def _checked(self, rows: Tensor) -> Tensor:
        vector = self.aggregator(rows)
        if not isinstance(vector, Tensor) or vector.shape != rows.shape[1:]:
            found = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(
                f"`weighting` must map a (K, n) tensor to an (n,) tensor, got {found} for {tuple(rows.shape)}."
            )
        return vector

    def __repr__(self) -> str:
        return repr(self.aggregator)


def as_weighting(weighting: Weighting | Aggregator | None) -> Weighting:
    """Return ``weighting`` as a :class:`Weighting`; ``None`` is the paper's."""
    if weighting is None:
        return RotoGradWeighting()
    if isinstance(weighting, Weighting):
        return weighting
    if isinstance(weighting, type) or not callable(weighting):
        raise TypeError(
            "`weighting` must be a Weighting or a callable (K, n) -> (n,), such as RotoGradWeighting(), "
            f"GradNorm(alpha=1.5), EqualWeighting() or a TorchJD aggregator, got {weighting!r}."
        )
    return CallableWeighting(weighting)
