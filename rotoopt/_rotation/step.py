"""The interface of a rotation step: the gradient of the rotations, and the protocol of its users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from rotoopt._torch.processes import Processes


@dataclass(frozen=True)
class RotationGradient:
    r"""The gradient of the rotation objective at one tensor in one backward pass, in factors.

    The objective, :math:`-\sum_s \langle R_k^\top \tilde g_{s,k}, v_s \rangle` over samples s, is linear in R_k. Its
    gradient along the Lie algebra is the skew matrix :math:`S_k = N_k - N_k^\top` with :math:`N_k = U_k V^\top`.

    Attributes:
        directions: U, the unit gradients of the tasks at the representation, zero for absent ones.
            Shape ``(K, L, d, P)``.
        target: V, their mean, a constant. Shape ``(L, d, P)``.
        usable: Whether all values in the pass were finite; if not, U and V are zero. Shape ``()``, bool.
        second_moment: :math:`\sum_s z_s z_s^\top` of the rotated features. Shape ``(m, m)``. ``None`` if it was not
            measured.

    Source: Javaloy and Valera, RotoGrad, ICLR 2022, eq. 3, with unit gradients on both sides (there, g is not
    normalized), so that it is invariant to the scale of a loss.
    """

    directions: Tensor
    target: Tensor
    usable: Tensor
    second_moment: Tensor | None = None

    @classmethod
    def none(cls, num_tasks: int, size: int, like: Tensor) -> RotationGradient:
        """Return the gradient of an empty batch, in the dtype of ``like``, marked as not usable."""
        directions = like.new_zeros(num_tasks, 0, size, 1)
        return cls(directions, directions[0], torch.zeros_like(like[0], dtype=torch.bool))

    @property
    def num_samples(self) -> int:
        """Number of samples, L P."""
        return self.target.shape[0] * self.target.shape[2]

    def correlation(self, size: int) -> Tensor:
        r"""Return :math:`N_k` on the first ``size`` features. Shape ``(K, size, size)``."""
        U, V = self.directions[:, :, :size], self.target[:, :size]
        if U.shape[3] == 1:
            return U.squeeze(3).mT @ V.squeeze(2)
        return torch.einsum("klip,ljp->kij", U, V)


def sum_of_correlations(gradients: Sequence[RotationGradient], size: int, processes: Processes) -> Tensor:
    """Return the sum of the N of ``gradients``, over the joined batch of all processes. ``(K, size, size)``."""
    first, *others = (each.correlation(size) for each in gradients)
    correlation = sum(others, first)
    if processes.count > 1:
        processes.sum_(correlation)
    return correlation


def any_usable(gradients: Sequence[RotationGradient], processes: Processes) -> Tensor:
    """Return whether one of ``gradients`` is usable, on any process. Shape ``()``, bool."""
    count = torch.stack([each.usable for each in gradients]).sum()
    if processes.count > 1:
        processes.sum_(count)
    return count > 0


class RotationStep(Protocol):
    """Updates the rotations with an optimizer.

    Attributes:
        optimizer: The optimizer; learning-rate schedulers attach to it.
        needs_second_moment: Whether gradients must include the second moment of the representation.
    """

    optimizer: Optimizer
    needs_second_moment: bool

    def step(self, gradients: Sequence[RotationGradient], remaining: Tensor | None = None) -> Tensor | None:
        """Update the rotations with the sum of ``gradients``, one per backward pass since the latest step.

        Args:
            gradients: The gradients.
            remaining: Factors of the sizes of built-in updates: :attr:`~rotoopt.weighting.Weighting.remaining`.

        Returns:
            The angle by which each rotation turned, in radians: the root mean square over all vectors. Shape ``(K,)``.
            None if there are no gradients.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
