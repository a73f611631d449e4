"""The rotation step: from the task gradients to a turn of every R_k along its Lie algebra."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt.representation import correlate
from rotoopt.rotations import Rotations

RotationOptimizer = Callable[[list[nn.Parameter]], Optimizer]

# The rotation objective of a batch improves for every step below 1 / ||N_k||, and ||N_k|| = ||U_k V^T|| <= 1.
MAX_STEP = 1.0


def rotation_gradient(directions: Tensor, target: Tensor, size: int) -> Tensor:
    r"""Return the gradient of the rotation objective in the coordinates of the Lie algebra, at R_k.

    The objective :math:`-\sum_s \langle R_k^\top \tilde g_{s,k}, v_s \rangle` over samples s is linear in R_k. Along
    :math:`R_k\,\mathrm{cay}(A - A^\top)`, A lower triangular, its gradient at A = 0 is
    :math:`-\mathrm{tril}(N_k - N_k^\top)` with :math:`N_k = U_k V^\top`.

    Args:
        directions: U, the unit gradients of the tasks at the representation. Shape ``(K, L, d, P)``.
        target: V, their mean, taken as constant. Shape ``(L, d, P)``.
        size: m, the number of features that are rotated.

    Returns:
        Strictly lower triangular. Shape ``(K, m, m)``.

    Source: Javaloy and Valera, RotoGrad, ICLR 2022, eq. 3, with unit gradients on both sides (there g is not
    normalized), so that the scale of a loss cancels. The official code minimizes a squared distance whose
    gradient is the paper's times twice the norm of the mean gradient.
    """
    correlation = correlate(directions, target, size)
    return (correlation.mT - correlation).tril(-1)


class NormalizedStep(Optimizer):
    r"""The built-in rotation optimizer: a gradient step with one AdaGrad normalizer per rotation.

    .. math:: A_k \leftarrow A_k - \eta_k \nabla_k, \qquad
        \eta_k = \min\Bigl(1, \; \mathrm{lr} \sqrt{D} \,/\, \sqrt{\textstyle\sum_t \lVert\nabla_k^t\rVert^2}\Bigr),
        \qquad D = m (m - 1) / 2

    ``lr`` is the root mean square turn, in radians per coordinate, of the first step. Later steps shrink as
    :math:`1/\sqrt t`: rotations must learn more slowly than the network (section 4 of the paper), and a step
    normalized by the size of the latest gradients alone would move on noise for ever.

    Args:
        params: Lie-algebra coordinates, each of shape ``(K, m, m)``.
        lr: Learning rate; schedulers may change it.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every coordinate that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._move(param, group["lr"])
        return loss

    def _move(self, param: Tensor, lr: float) -> None:
        grad = param.grad
        assert grad is not None  # the caller's condition, for the type checker
        squares = grad.square().sum(dim=(-2, -1))  # (K,)
        total = self.state[param].setdefault("sum", torch.zeros_like(squares))
        total.add_(squares)
        m = param.shape[-1]
        step = (lr * math.sqrt(m * (m - 1) / 2) / total.sqrt()).clamp(max=MAX_STEP)
        param.sub_(torch.where(total > 0, step, 0.0)[:, None, None] * grad)


class RotationStep:
    """Collects rotation gradients and turns the rotations by what an optimizer makes of them.

    The optimizer sees one parameter, the Lie-algebra coordinates A of shape ``(K, m, m)`` around the present
    rotations, with its gradient in the lower triangle. After its step the turn is applied, R_k <- R_k cay(A - A^T),
    and A starts again at zero; its own state (moments) lives on.

    Args:
        rotations: The rotations to turn.
        make_optimizer: Makes the optimizer of the coordinates.
    """

    def __init__(self, rotations: Rotations, make_optimizer: RotationOptimizer) -> None:
        self.rotations = rotations
        self.num_gradients = 0
        self.usable: Tensor | None = None
        # Sized by the first gradient: the optimizer, and schedulers on it, exist before the rotations do.
        empty = torch.zeros(rotations.num_tasks, 0, 0, device=rotations.device, dtype=rotations.dtype)
        self.coordinates = nn.Parameter(empty)
        self.optimizer = make_optimizer([self.coordinates])
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                "`rotation_optimizer` must be a callable from parameters to a torch.optim.Optimizer, "
                f"got one that returns {type(self.optimizer).__name__}. "
                "Example: rotation_optimizer=lambda params: torch.optim.Adam(params, lr=1e-4)."
            )

    @torch.no_grad()
    def collect(self, directions: Tensor, target: Tensor, usable: Tensor) -> None:
        """Add the rotation gradient of one backward pass; several before a step are averaged.

        Args:
            directions: U. Shape ``(K, L, d, P)``.
            target: V. Shape ``(L, d, P)``.
            usable: Whether everything in this pass was finite; if not, it counts as zero. Shape ``()``, bool.
        """
        matrices = self.rotations.matrices
        if self.coordinates.shape != matrices.shape:
            self.coordinates.data = torch.zeros_like(matrices)
        grad = rotation_gradient(directions, target, matrices.shape[-1])
        grad = torch.where(usable, grad, 0.0)
        self.usable = usable if self.usable is None else self.usable | usable
        for task, rotate in enumerate(self.rotations.rotate):
            if not rotate:
                grad[task] = 0.0
        self.num_gradients += 1
        if self.coordinates.grad is None:
            self.coordinates.grad = grad
        else:
            self.coordinates.grad += (grad - self.coordinates.grad) / self.num_gradients

    @torch.no_grad()
    def step(self) -> None:
        """Turn the rotations; a no-op when nothing was collected."""
        if self.usable is None:
            return
        self.optimizer.step()
        # Where nothing was usable, what moved the coordinates is momentum.
        skew = torch.where(self.usable, self.coordinates.tril(-1), 0.0)
        self.rotations.turn_(skew - skew.mT)
        self.coordinates.zero_()
        self.clear()

    def clear(self) -> None:
        """Forget what was collected since the last step."""
        self.coordinates.grad = None
        self.num_gradients = 0
        self.usable = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer of the coordinates."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        if self.rotations.size is not None:  # state tensors are matched with the shape of the coordinates
            self.coordinates.data = torch.zeros_like(self.rotations.matrices)
        self.optimizer.load_state_dict(state_dict)
