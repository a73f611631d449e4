"""The adapter that lets any torch optimizer drive the rotations: the official recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt.devices import move_
from rotoopt.distributed import Processes
from rotoopt.representation import correlate
from rotoopt.rotations import Rotations

RotationOptimizer = Callable[[list[nn.Parameter]], Optimizer]


def coordinate_gradient(directions: Tensor, target: Tensor, size: int) -> Tensor:
    r"""Return the gradient of the rotation objective in the coordinates of the Lie algebra, at R_k.

    Along :math:`R_k\,\mathrm{cay}(A - A^\top)`, A lower triangular, the gradient at A = 0 of the objective of
    :class:`~rotoopt.rotation_step.CayleyStep` is :math:`-\mathrm{tril}(N_k - N_k^\top)` with
    :math:`N_k = U_k V^\top`.

    Args:
        directions: U, the unit gradients of the tasks at the representation. Shape ``(K, L, d, P)``.
        target: V, their mean, taken as constant. Shape ``(L, d, P)``.
        size: m, the number of features that are rotated.

    Returns:
        Strictly lower triangular. Shape ``(K, m, m)``.
    """
    correlation = correlate(directions, target, size)
    return (correlation.mT - correlation).tril(-1)


class LieAlgebraStep:
    """A rotation step by an optimizer of the user's, in every step.

    The optimizer sees one parameter, the Lie-algebra coordinates A of shape ``(K, m, m)`` around the present
    rotations, with its gradient in the lower triangle. After its step the turn is applied, R_k <- R_k cay(A - A^T),
    and A starts again at zero; its own state (moments) lives on.

    Args:
        rotations: The rotations to turn.
        make_optimizer: Makes the optimizer of the coordinates.
        processes: Those that share a batch.
    """

    def __init__(self, rotations: Rotations, make_optimizer: RotationOptimizer, processes: Processes) -> None:
        self.rotations = rotations
        self._processes = processes
        self._num_usable: Tensor | None = None  # of the gradients that the present one is the sum of
        # Sized by the first gradient: the optimizer, and schedulers on it, exist before the rotations do.
        empty = torch.zeros(rotations.num_tasks, 0, 0, device=rotations.device, dtype=rotations.dtype)
        self._coordinates = nn.Parameter(empty)
        self.optimizer = make_optimizer([self._coordinates])
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                "`rotation_optimizer` must be a callable from parameters to a torch.optim.Optimizer, "
                f"got one that returns {type(self.optimizer).__name__}. "
                "Example: rotation_optimizer=lambda params: torch.optim.Adam(params, lr=1e-4)."
            )

    def is_due(self, num_steps: int) -> bool:
        """Always: the schedule is the optimizer's."""
        return True

    @torch.no_grad()
    def collect(self, directions: Tensor, target: Tensor, usable: Tensor) -> None:
        """Add the gradient of one backward pass; several before a step are averaged."""
        matrices = self.rotations.matrices
        if self._coordinates.shape != matrices.shape:
            self._coordinates.data = torch.zeros_like(matrices)
        grad = coordinate_gradient(directions, target, matrices.shape[-1])
        grad = torch.where(usable & self.rotations.rotates[:, None, None], grad, 0.0)
        if self._num_usable is None or self._coordinates.grad is None:
            self._num_usable, self._coordinates.grad = usable.to(grad), grad
        else:
            self._num_usable += usable
            mean = self._coordinates.grad
            mean += usable * (grad - mean) / self._num_usable.clamp(min=1)

    @torch.no_grad()
    def step(self) -> None:
        """Turn the rotations by what the optimizer makes of the gradients."""
        if self._num_usable is None:
            return
        if self._processes.count > 1 and self._coordinates.grad is not None:
            self._processes.sum_(self._coordinates.grad)
        self.optimizer.step()
        # Where nothing was usable, what moved the coordinates is momentum.
        skew = torch.where(self._num_usable > 0, self._coordinates.tril(-1), 0.0)
        self.rotations.turn_(skew - skew.mT)
        self._coordinates.zero_()
        self.clear()

    def clear(self) -> None:
        """Forget what was collected since the last step."""
        self._coordinates.grad = None
        self._num_usable = None

    def to(self, device: torch.device) -> None:
        """Move the state to ``device``."""
        move_(self._coordinates, self.optimizer, device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer of the coordinates."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        if self.rotations.size is not None:  # state tensors are matched with the shape of the coordinates
            self._coordinates.data = torch.zeros_like(self.rotations.matrices)
        self.optimizer.load_state_dict(state_dict)
