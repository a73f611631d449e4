"""A model with rotations, and with task weights that the user's optimizer trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt._engine.losses import Losses
from rotoopt.rotograd._rotated import RotoGrad
from rotoopt.rotograd._state_dict import has_official_rotations
from rotoopt.weighting import GradNorm, Measurements, Weighting


class RotoGradNorm(RotoGrad):
    """Rotations, and the trained task weights of GradNorm.

    The arguments are those of :class:`RotateOnly`, and

    Args:
        alpha: How strongly slow tasks are favored; see :class:`~rotoopt.GradNorm`.

    Attributes:
        weight_: The parameter that trains the weights: their logits. Shape ``(K,)``.
    """

    weight_: nn.Parameter

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[nn.Module] | nn.ModuleList,
        rotation_shape: int | Sequence[int],
        *,
        alpha: float,
        post_shape: Sequence[int] = (),
        normalize_losses: bool = False,
        burn_in_period: int = 20,
    ) -> None:
        self.alpha = alpha
        self._gradnorm = UserTrainedGradNorm(alpha)
        super().__init__(  # needs the weighting
            backbone,
            heads,
            rotation_shape,
            post_shape=post_shape,
            normalize_losses=normalize_losses,
            burn_in_period=burn_in_period,
        )
        self.weight_ = self._gradnorm.logits

    def _make_weighting(self) -> Weighting:
        return self._gradnorm

    def backward(self, losses: Losses, backbone_loss: Tensor | None = None, **kwargs: Any) -> None:
        """Compute all gradients: see :meth:`RotateOnly.backward`."""
        self._engine.memory.weights = self._gradnorm.weights  # as updated by the user's optimizer
        super().backward(losses, backbone_loss, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if has_official_rotations(state_dict, prefix):  # one parameter per task in the official package
            weights = [state_dict.pop(f"{prefix}weight_.{task}") for task in range(self.num_tasks)]
            state_dict[f"{prefix}weight_"] = torch.stack(weights)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def weight(self) -> Sequence[Tensor]:
        """The weight of every task, positive, with sum K. Detached. To train it: :attr:`weight_`."""
        return list(self._gradnorm.weights)


class UserTrainedGradNorm(GradNorm):
    """GradNorm whose logits are trained by the user's optimizer: their gradients accumulate in ``logits.grad``."""

    def __call__(self, measured: Measurements) -> Tensor:
        """Accumulate the gradient of the logits, and return the current weights."""
        grad = self.gradient(self.logits, measured)
        self.logits.grad = grad if self.logits.grad is None else self.logits.grad + grad
        return self.weights
