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


class Coordinates:
    """Lie-algebra coordinates A around the present rotations, for whoever wants to step on them.

    One parameter of shape ``(K, m, m)``, which is zero but between a step of its optimizer and :meth:`turn`.
    Only its lower triangle counts.

    Args:
        rotations: The rotations to turn.
    """

    def __init__(self, rotations: Rotations) -> None:
        self.rotations = rotations
        # Sized by the first gradient: the optimizer, and schedulers on it, exist before the rotations do.
        empty = torch.zeros(rotations.num_tasks, 0, 0, device=rotations.device, dtype=rotations.dtype)
        self.parameter = nn.Parameter(empty)
        self.fit()

    def fit(self) -> None:
        """Take on the size of the rotations, if there are any."""
        if self.rotations.size is not None and self.parameter.shape != self.rotations.matrices.shape:
            self.parameter.data = torch.zeros_like(self.rotations.matrices)

    def gradient(self, directions: Tensor, target: Tensor, usable: Tensor) -> Tensor:
        """Return the gradient of one backward pass, zero if it is not usable or a task is not rotated."""
        self.fit()
        grad = coordinate_gradient(directions, target, self.parameter.shape[-1])
        return torch.where(usable & self.rotations.rotates[:, None, None], grad, 0.0).to(self.parameter.dtype)

    @torch.no_grad()
    def turn(self, where: Tensor | bool = True) -> Tensor:
        """Apply the turn, R_k <- R_k cay(A_k - A_k^T), and start again at zero.

        Args:
            where: Whether to apply it. Shape ``()``, bool.

        Returns:
            Its angles, for small ones; see :class:`~rotoopt.rotation_step.RotationStep`. Shape ``(K,)``.
        """
        lower = self.parameter.tril(-1)
        lower = torch.where(torch.as_tensor(where, device=lower.device), lower, 0.0)
        skew = lower - lower.mT
        self.rotations.turn_(skew)
        self.parameter.zero_()
        return skew.square().mean(dim=1).sum(dim=1).sqrt()


class LieAlgebraStep:
    """A rotation step by an optimizer of the user's, in every step.

    The optimizer sees one parameter, the :class:`Coordinates`, with its gradient in the lower triangle. After its step
    the turn is applied, and the coordinates start again at zero; its own state (moments) lives on.

    Args:
        rotations: The rotations to turn.
        make_optimizer: Makes the optimizer of the coordinates.
        processes: Those that share a batch.
    """

    def __init__(self, rotations: Rotations, make_optimizer: RotationOptimizer, processes: Processes) -> None:
        self.rotations = rotations
        self._processes = processes
        self._num_usable: Tensor | None = None  # of the gradients that the present one is the mean of
        self._coordinates = Coordinates(rotations)
        self.optimizer = make_optimizer([self._coordinates.parameter])
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                "`rotation_optimizer` must be a callable from parameters to a torch.optim.Optimizer, "
                f"got one that returns {type(self.optimizer).__name__}. "
                "Example: rotation_optimizer=lambda params: torch.optim.Adam(params, lr=1e-4)."
            )

    @property
    def lr(self) -> float | Tensor:
        """Learning rate, which a scheduler may change."""
        lr: float | Tensor = self.optimizer.param_groups[0]["lr"]
        return lr

    def is_due(self, num_steps: int) -> bool:
        """Always: the schedule is the optimizer's."""
        return True

    @torch.no_grad()
    def collect(self, directions: Tensor, target: Tensor, usable: Tensor) -> None:
        """Add the gradient of one backward pass; several before a step are averaged."""
        grad, param = self._coordinates.gradient(directions, target, usable), self._coordinates.parameter
        if self._num_usable is None or param.grad is None:
            self._num_usable, param.grad = usable.to(grad), grad
        else:
            self._num_usable += usable
            param.grad += usable * (grad - param.grad) / self._num_usable.clamp(min=1)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Turn the rotations by what the optimizer makes of the gradients; return the angles."""
        if self._num_usable is None:
            return torch.zeros_like(self.rotations.rotates, dtype=self.rotations.dtype)
        grad = self._coordinates.parameter.grad
        if self._processes.count > 1 and grad is not None:
            self._processes.sum_(grad)
        self.optimizer.step()
        angles = self._coordinates.turn(self._num_usable > 0)  # where nothing was usable, what moved them is momentum
        self.clear()
        return angles

    def clear(self) -> None:
        """Forget what was collected since the last step."""
        self._coordinates.parameter.grad = None
        self._num_usable = None

    def to(self, device: torch.device) -> None:
        """Move the state to ``device``."""
        move_(self._coordinates.parameter, self.optimizer, device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer of the coordinates."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._coordinates.fit()  # state tensors are matched with the shape of the coordinates
        self.optimizer.load_state_dict(state_dict)
