"""GradNorm: task weights that are trained, so that tasks train at similar rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt.devices import move_
from rotoopt.gradients import TaskGradients
from rotoopt.weighting import Combined, Progress, Weighting

CommonNorm = Literal["norm_of_mean", "mean_of_norms"]


def gradnorm_gradient(weights: Tensor, norms: Tensor, targets: Tensor, present: Tensor) -> Tensor:
    r"""Gradient of the GradNorm loss in the logits of the weights.

    The loss is :math:`\sum_{k \in P} | w_k \lVert G_k \rVert - T_k |` with T constant, and
    :math:`w = K\,\mathrm{softmax}(\ell)`, so that weights stay positive and sum to K.

    Args:
        weights: w. Shape ``(K,)``.
        norms: :math:`\lVert G_k \rVert`. Shape ``(K,)``.
        targets: T. Shape ``(K,)``.
        present: P. Shape ``(K,)``, bool.

    Returns:
        Gradient in :math:`\ell`, shape ``(K,)``. Zero where a single task is present (its target is its own norm,
        and the sign would be that of a rounding error) or where something is not finite.
    """
    in_weights = torch.where(present, (weights * norms - targets).sign() * norms, 0.0)
    gradient = weights * (in_weights - (weights * in_weights).sum() / len(weights))
    return torch.where(gradient.isfinite().all() & (present.sum() > 1), gradient, 0.0)


class GradNorm(Weighting):
    r"""Trained task weights that drive the gradient norms towards the tasks' rates of training.

    .. math:: T_k = \Bigl\lVert \tfrac{1}{|P|} \textstyle\sum_i w_i G_i \Bigr\rVert \,
        \Bigl(\frac{\tilde L_k}{\mathrm{mean}_i \tilde L_i}\Bigr)^{\alpha}, \qquad \tilde L_k = L_k / |L_k(t_0)|

    The weights minimize :math:`\sum_k | w_k \lVert G_k \rVert - T_k |`; the combination is :math:`\sum_k w_k G_k`.

    Args:
        alpha: :math:`\alpha`, how strongly slow tasks are favored; 0 asks for equal norms.
        lr: Learning rate of the weights.
        optimizer: Makes the optimizer of the weights from their logits, instead of Adam with ``lr``.
        common_norm: ``"norm_of_mean"``, as above, or ``"mean_of_norms"``: :math:`\tfrac{1}{|P|} \sum_i w_i \lVert
            G_i \rVert` in its place, which is not smaller where tasks conflict.

    Source: Chen et al., GradNorm, ICML 2018, eqs. 1-2, which has the mean of the norms, at the last shared layer; here
    they are taken at the representation. The norm of the mean is that of ``RotoGradNorm`` in the official RotoGrad
    package.
    """

    needs_losses = True

    def __init__(
        self,
        alpha: float = 1.5,
        *,
        lr: float = 0.025,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        common_norm: CommonNorm = "norm_of_mean",
    ) -> None:
        if not alpha >= 0:
            raise ValueError(f"`alpha` must be a non-negative number, got {alpha!r}.")
        if common_norm not in get_args(CommonNorm):
            raise ValueError(f"`common_norm` must be one of {get_args(CommonNorm)}, got {common_norm!r}.")
        self.alpha = alpha
        self.common_norm: CommonNorm = common_norm
        self._make_optimizer = optimizer or _Adam(lr)
        self._trained: tuple[nn.Parameter, Optimizer] | None = None
        self._usable: Tensor | None = None

    def bind(self, num_tasks: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make the logits; a weighting belongs to one optimizer."""
        if self._trained is not None:
            raise ValueError(
                "`weighting` must not be shared between optimizers, got a GradNorm that another one trains. "
                "Make a new GradNorm for this one."
            )
        logits = nn.Parameter(torch.zeros(num_tasks, device=device, dtype=dtype))
        self._trained = logits, self._make_optimizer([logits])

    @property
    def logits(self) -> nn.Parameter:
        """The logits of the weights. Shape ``(K,)``, float32 (float64 for a float64 network)."""
        return self._state()[0]

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the logits; schedulers attach to it."""
        return self._state()[1]

    def _state(self) -> tuple[nn.Parameter, Optimizer]:
        if self._trained is None:
            raise RuntimeError(
                "GradNorm must belong to an optimizer before its weights are read or trained, got one that does not. "
                "Pass it to RotoGradOptimizer(..., weighting=...) first."
            )
        return self._trained

    @property
    def weights(self) -> Tensor:
        """The weights in force: positive, sum K. Shape ``(K,)``."""
        logits = self.logits.detach()
        return len(logits) * logits.softmax(0)

    def combine(self, gradients: TaskGradients, progress: Progress) -> Combined:
        r"""Return :math:`\sum_k w_k G_k` and w, and collect the gradient of w."""
        if progress.loss_ratios is None:
            raise RuntimeError(
                "GradNorm must see the losses, got none. Call optimizer.step(losses) or optimizer.backward(losses) "
                "instead of your own sum(losses).backward()."
            )
        logits, weights = self.logits, self.weights.to(gradients.scale)
        used = weights * gradients.present
        vector, norm = gradients.combine_with_norm(used)
        if self.common_norm == "mean_of_norms":
            norm = (used * gradients.norms).sum()
        mean_norm = norm / gradients.num_present
        mean_ratio = torch.where(gradients.present, progress.loss_ratios, 0.0).sum() / gradients.num_present
        targets = mean_norm * (progress.loss_ratios / mean_ratio) ** self.alpha
        grad = gradnorm_gradient(weights, gradients.norms, targets, gradients.present)
        grad = torch.where(progress.finite, grad, 0.0).to(logits.dtype)
        logits.grad = grad if logits.grad is None else logits.grad + grad
        self._usable = progress.finite if self._usable is None else self._usable | progress.finite
        return Combined(vector, used)

    def to(self, device: torch.device) -> None:
        """Move the logits and the state of their optimizer to ``device``."""
        move_(self.logits, self.optimizer, device)

    def step(self) -> None:
        """Train the weights by one step; a no-op when nothing was usable."""
        if self._usable is None:
            return
        before = self.logits.detach().clone()
        self.optimizer.step()
        with torch.no_grad():  # where nothing was finite, what moved the logits is momentum
            self.logits.copy_(torch.where(self._usable, self.logits, before))
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradient of the logits."""
        self.logits.grad = None
        self._usable = None

    def state_dict(self) -> dict[str, Any]:
        """Return logits and the state of their optimizer."""
        return {"logits": self.logits.detach().clone(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        with torch.no_grad():
            self.logits.copy_(state_dict["logits"])
        self.optimizer.load_state_dict(state_dict["optimizer"])

    def __repr__(self) -> str:
        return f"GradNorm(alpha={self.alpha})"


class _Adam:
    """Adam with a given learning rate: a class because optimizers that hold it are pickled."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __call__(self, params: list[nn.Parameter]) -> Optimizer:
        return torch.optim.Adam(params, lr=self.lr)
