"""GradNorm: trained task weights, so that tasks train at similar rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt._torch.devices import move_
from rotoopt.weighting._measurements import Measurements
from rotoopt.weighting._weighting import Weighting

CommonNorm = Literal["norm_of_mean", "mean_of_norms"]


def softmax_weights(logits: Tensor) -> Tensor:
    r"""Return :math:`w = K\,\mathrm{softmax}(\ell)`, detached. Shape ``(K,)``."""
    logits = logits.detach()
    return len(logits) * logits.softmax(0)


def gradnorm_gradient(weights: Tensor, norms: Tensor, targets: Tensor, present: Tensor) -> Tensor:
    r"""Gradient of the GradNorm loss with respect to the logits of the weights.

    The loss is :math:`\sum_{k \in P} | w_k \lVert G_k \rVert - T_k |` with T constant, and
    :math:`w = K\,\mathrm{softmax}(\ell)`, so that weights stay positive and sum to K.

    Args:
        weights: w. Shape ``(K,)``.
        norms: :math:`\lVert G_k \rVert`. Shape ``(K,)``.
        targets: T. Shape ``(K,)``.
        present: P. Shape ``(K,)``, bool.

    Returns:
        Gradient with respect to :math:`\ell`, shape ``(K,)``. Zero if a single task is present (its target is its own
        norm, so the sign would be that of a rounding error) or if a value is not finite.
    """
    in_weights = torch.where(present, (weights * norms - targets).sign() * norms, 0.0)
    gradient = weights * (in_weights - (weights * in_weights).sum() / len(weights))
    return torch.where(gradient.isfinite().all() & (present.sum() > 1), gradient, 0.0)


class GradNorm(Weighting):
    r"""Trained task weights that drive the gradient norms towards the tasks' rates of training.

    .. math:: T_k = \Bigl\lVert \tfrac{1}{|P|} \textstyle\sum_i w_i G_i \Bigr\rVert \,
        \Bigl(\frac{\tilde L_k}{\mathrm{mean}_i \tilde L_i}\Bigr)^{\alpha}, \qquad \tilde L_k = L_k / |L_k(t_0)|

    The weights minimize :math:`\sum_k | w_k \lVert G_k \rVert - T_k |`; the combination is :math:`\sum_k w_k G_k`.
    A step with a single task compares nothing, and does not change them: with one task per step, they stay equal.

    Args:
        alpha: :math:`\alpha`, how strongly slow tasks are favored; 0 gives equal norms.
        lr: Learning rate of the weights.
        optimizer: Builds the optimizer of the logits, given a list of parameters. Default: Adam with ``lr``.
        common_norm: ``"norm_of_mean"``, as above, or ``"mean_of_norms"``, which replaces that factor by
            :math:`\tfrac{1}{|P|} \sum_i w_i \lVert G_i \rVert`; it does not shrink if tasks conflict.

    Source: Chen et al., GradNorm, ICML 2018, eqs. 1-2, which uses the mean of the norms at the last shared layer; here
    they are measured at the representation. The norm of the mean is that of ``RotoGradNorm`` in the official RotoGrad
    package.
    """

    lagged = True
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
        self.needs_cosines = common_norm == "norm_of_mean"
        self._make_optimizer = optimizer or _Adam(lr)
        self._trained: tuple[nn.Parameter, Optimizer] | None = None

    def bind(self, num_tasks: int, device: torch.device, dtype: torch.dtype) -> None:
        """Create the logits and their optimizer."""
        super().bind(num_tasks, device, dtype)
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
                "GradNorm must belong to an optimizer before its weights are read or trained, got one without an "
                "optimizer. Pass it to RotoGradOptimizer(..., weighting=...) first."
            )
        return self._trained

    @property
    def weights(self) -> Tensor:
        """The weights of the next backward pass: positive, with sum K. Shape ``(K,)``."""
        return softmax_weights(self.logits)

    def __call__(self, measured: Measurements) -> Tensor:
        """Update the weights by one step, and return them."""
        before = self.logits.detach().clone()
        self.logits.grad = self.gradient(self.logits, measured)
        self.optimizer.step()
        self.logits.grad = None
        with torch.no_grad():  # without any task, only momentum moves the logits
            self.logits.copy_(torch.where(measured.present.any(), self.logits, before))
        return self.weights

    def gradient(self, logits: Tensor, measured: Measurements) -> Tensor:
        """Return the gradient of the GradNorm loss with respect to ``logits``, shape ``(K,)``."""
        ratios, present = measured.loss_ratios, measured.present
        assert ratios is not None  # `needs_losses`
        weights = softmax_weights(logits)
        mean_norm = self._norm(torch.where(present, weights * measured.norms, 0.0), measured.cosines) / present.sum()
        mean_ratio = torch.where(present, ratios, 0.0).sum() / present.sum()
        targets = mean_norm * (ratios / mean_ratio) ** self.alpha
        return gradnorm_gradient(weights, measured.norms, targets, present).to(logits.dtype)

    def _norm(self, norms: Tensor, cosines: Tensor | None) -> Tensor:
        """Return the norm of the sum of gradients with these ``norms``, or the sum of the norms."""
        if cosines is None or self.common_norm == "mean_of_norms":
            return norms.sum()
        largest = norms.amax()  # divide by it first: squares of large norms overflow
        relative = norms / largest
        return largest * (relative @ cosines @ relative).clamp(min=0.0).sqrt()

    def to(self, device: torch.device) -> None:
        """Move the logits and the state of their optimizer to ``device``."""
        move_(self.logits, self.optimizer, device)

    def state_dict(self) -> dict[str, Any]:
        """Return logits and the state of their optimizer."""
        return {"logits": self.logits.detach().clone(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any], like: Tensor) -> None:
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
