"""Weightings: how the K task gradients at the representation become the one that the backbone receives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
    peak = ratios.amax()
    ratios = torch.where(peak > 0, ratios / peak, ratios)
    mean = torch.where(known.any(), ratios.sum() / known.sum().clamp(min=1), 1.0)
    ratios = torch.where(present & ~known, mean, ratios)
    total = ratios.sum()
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

    Source: Chen et al., GradNorm, ICML 2018, eqs. 1-2. As in ``RotoGradNorm`` of the official RotoGrad package, the
    common norm is that of the mean gradient (GradNorm: the mean of the norms), taken at the representation.
    """

    needs_losses = True

    def __init__(
        self,
        alpha: float = 1.5,
        *,
        lr: float = 0.025,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        if not alpha >= 0:
            raise ValueError(f"`alpha` must be a non-negative number, got {alpha!r}.")
        self.alpha = alpha
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
        # The norm of the sum, taken at the largest scale: squares of huge gradients overflow.
        largest = torch.where(gradients.present, gradients.scale, 0.0).amax()
        vector = (weights * gradients.present * gradients.scale / largest) @ gradients.scaled
        num_present = len(gradients.tasks)
        mean_norm = torch.linalg.vector_norm(vector) * largest / num_present
        mean_ratio = torch.where(gradients.present, progress.loss_ratios, 0.0).sum() / num_present
        targets = mean_norm * (progress.loss_ratios / mean_ratio) ** self.alpha
        grad = gradnorm_gradient(weights, gradients.norms, targets, gradients.present)
        grad = torch.where(progress.finite, grad, 0.0).to(logits.dtype)
        logits.grad = grad if logits.grad is None else logits.grad + grad
        self._usable = progress.finite if self._usable is None else self._usable | progress.finite
        return Combined(vector * largest, weights * gradients.present)

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


class CallableWeighting(Weighting):
    """Any function of the ``(|P|, n)`` matrix of present task gradients, such as a TorchJD aggregator.

    Args:
        aggregator: Maps ``(|P|, n)``, float32 (float64 for float64 representations), to ``(n,)``.
    """

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = aggregator

    def combine(self, gradients: TaskGradients, progress: Progress) -> Combined:
        """Return what the aggregator makes of the gradients; its weights are its own business: NaN."""
        rows = gradients.rows()
        vector = self.aggregator(rows)
        if not isinstance(vector, Tensor) or vector.shape != rows.shape[1:]:
            found = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(
                f"`weighting` must map a (K, n) tensor to an (n,) tensor, got {found} for {tuple(rows.shape)}."
            )
        return Combined(vector, torch.full_like(gradients.scale, float("nan")))

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
