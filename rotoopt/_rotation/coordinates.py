"""Lie-algebra coordinates of an update, and the rotation step with the user's optimizer: the official recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt._rotation.cayley import turn_
from rotoopt._rotation.rotations import Rotations
from rotoopt._rotation.step import RotationGradient, any_usable, sum_of_correlations
from rotoopt._torch.devices import move_
from rotoopt._torch.processes import Processes

RotationOptimizer = Callable[[list[nn.Parameter]], Optimizer]


class Coordinates:
    r"""Lie-algebra coordinates A around the current rotations, to be trained by an optimizer.

    One parameter of shape ``(K, m, m)``, which is zero except between a step of its optimizer and :meth:`turn`. Only
    its lower triangle is used: along :math:`R_k\,\mathrm{cay}(A_k - A_k^\top)`, A lower triangular, the gradient of the
    rotation objective at A = 0 is :math:`-\mathrm{tril}(S_k)`.

    Args:
        rotations: The rotations.
        processes: The processes that share a batch.
    """

    def __init__(self, rotations: Rotations, processes: Processes) -> None:
        self.rotations = rotations
        self.processes = processes
        # The optimizer and its schedulers exist before the rotations do; the first gradient determines the size.
        empty = torch.zeros(rotations.num_tasks, 0, 0, device=rotations.device, dtype=rotations.dtype)
        self.parameter = nn.Parameter(empty)
        self.fit()

    def fit(self) -> None:
        """Resize to the size of the rotations, if they exist."""
        if self.rotations.size is not None and self.parameter.shape != self.rotations.matrices.shape:
            self.parameter.data = torch.zeros_like(self.rotations.matrices)

    def gradient(self, gradients: Sequence[RotationGradient]) -> Tensor:
        """Return the sum of ``gradients`` in coordinates, zero for a task that is not rotated."""
        self.fit()
        correlation = sum_of_correlations(gradients, self.parameter.shape[-1], self.processes)
        grad = (correlation.mT - correlation).tril(-1)
        return grad.masked_fill(self.rotations.rests[:, None, None], 0.0).to(self.parameter.dtype)

    @torch.no_grad()
    def turn(self, where: Tensor | bool = True) -> Tensor:
        """Apply the update R_k <- R_k cay(A_k - A_k^T) to the tasks that are rotated, and reset A to zero.

        Args:
            where: Whether to apply it. Shape ``()``, bool.

        Returns:
            Its angles, for small ones; see :class:`~rotoopt._rotation.step.RotationStep`. Shape ``(K,)``.
        """
        # Some optimizers change a parameter whose gradient is zero.
        lower = torch.where(where > self.rotations.rests[:, None, None], self.parameter.tril(-1), 0.0)
        skew = lower - lower.mT
        turn_(self.rotations.matrices, skew)
        self.parameter.zero_()
        return skew.square().mean(dim=1).sum(dim=1).sqrt()


class OptimizerStep:
    """A rotation step with the user's optimizer.

    The optimizer has one parameter, the :class:`Coordinates`, with its gradient in the lower triangle. After its step
    the update is applied, and the coordinates are reset to zero; the state of the optimizer (moments) is kept.

    Args:
        rotations: The rotations.
        make_optimizer: Builds the optimizer of the coordinates.
        processes: The processes that share a batch.
    """

    needs_second_moment = False

    def __init__(self, rotations: Rotations, make_optimizer: RotationOptimizer, processes: Processes) -> None:
        self._coordinates = Coordinates(rotations, processes)
        self.optimizer = make_optimizer([self._coordinates.parameter])
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                "`rotation_optimizer` must be a callable from parameters to a torch.optim.Optimizer, "
                f"got one that returns {type(self.optimizer).__name__}. "
                "Example: rotation_optimizer=lambda params: torch.optim.Adam(params, lr=1e-4)."
            )

    @torch.no_grad()
    def step(self, gradients: Sequence[RotationGradient], remaining: Tensor | None = None) -> Tensor | None:
        """Update the rotations with the optimizer, and return the angles. Its sizes do not depend on ``remaining``."""
        coordinates, rotations = self._coordinates, self._coordinates.rotations
        if coordinates.parameter.device != rotations.device:
            move_(coordinates.parameter, self.optimizer, rotations.device)
        if not gradients:
            return None
        coordinates.parameter.grad = coordinates.gradient(gradients)
        self.optimizer.step()
        coordinates.parameter.grad = None
        # If nothing was usable, only momentum has changed the coordinates.
        return coordinates.turn(any_usable(gradients, coordinates.processes))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer of the coordinates."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._coordinates.fit()  # torch matches state tensors with the shape of the coordinates
        self.optimizer.load_state_dict(state_dict)
