"""What one backward pass measures at the representation: K gradients, their norms and cosines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# 2**e for every e in between is a normal float32 number, so scaling by it is exact.
MIN_EXPONENT, MAX_EXPONENT = -126, 126


@dataclass(frozen=True)
class TaskGradients:
    r"""The gradients :math:`G_k` of K losses at the shared representation.

    They are kept as :math:`G_k = s_k \hat G_k` with :math:`s_k` a power of two and the entries of
    :math:`\hat G_k` below one, so that squares neither overflow nor vanish for gradients of any scale (a
    GradScaler multiplies by 65536), and no bit of a gradient is lost.

    Attributes:
        scaled: The gradients without their scale, one row per task, zero for an absent one. Shape ``(K, n)``,
            float32 or float64.
        scale: s. Shape ``(K,)``.
        tasks: The tasks that are present, in order.
        present: The same as a mask. Shape ``(K,)``, bool.
    """

    scaled: Tensor
    scale: Tensor
    tasks: tuple[int, ...]
    present: Tensor

    @classmethod
    def of(cls, grads: Tensor, tasks: tuple[int, ...], present: Tensor) -> TaskGradients:
        """Measure ``grads``, shape ``(K, n)``, which is scaled in place."""
        peak = grads.abs().amax(dim=1)
        exponent = torch.frexp(peak).exponent.clamp(MIN_EXPONENT, MAX_EXPONENT)
        scale = torch.where(peak.isfinite() & (peak > 0), torch.ldexp(torch.ones_like(peak), exponent), 1.0)
        return cls(grads.div_(scale[:, None]), scale, tasks, present)

    @cached_property
    def gram(self) -> Tensor:
        r"""Inner products :math:`\langle \hat G_i, \hat G_j \rangle`. Shape ``(K, K)``."""
        return self.scaled @ self.scaled.mT

    @cached_property
    def scaled_norms(self) -> Tensor:
        r"""Norms :math:`\lVert \hat G_k \rVert`. Shape ``(K,)``."""
        return self.gram.diagonal().sqrt()

    @cached_property
    def norms(self) -> Tensor:
        r"""Frobenius norms :math:`\lVert G_k \rVert` of the whole batch; zero for an absent task. Shape ``(K,)``."""
        return self.scaled_norms * self.scale

    @cached_property
    def finite(self) -> Tensor:
        """Whether every gradient is finite. Shape ``()``, bool."""
        return self.gram.isfinite().all()

    @cached_property
    def cosines(self) -> Tensor:
        """Cosines between the gradients, zero where one of them is zero. Shape ``(K, K)``."""
        inverse = self.inverse_scaled_norms
        return inverse[:, None] * self.gram * inverse

    @cached_property
    def inverse_scaled_norms(self) -> Tensor:
        r""":math:`1 / \lVert \hat G_k \rVert`, zero for a zero gradient. Shape ``(K,)``."""
        return torch.where(self.scaled_norms == 0, 0.0, 1.0 / self.scaled_norms)

    def rows(self) -> Tensor:
        """Return the gradients of the present tasks, unscaled. Shape ``(|P|, n)``."""
        grads = self.scaled * self.scale[:, None]
        return grads if len(self.tasks) == len(grads) else grads[list(self.tasks)]

    def combine(self, weights: Tensor) -> Tensor:
        r"""Return :math:`\sum_k w_k G_k`. ``weights``: shape ``(K,)``, finite. Shape ``(n,)``."""
        return (weights * self.scale) @ self.scaled

    def directions(self) -> Tensor:
        r"""Return the unit gradients :math:`U_k = G_k / \lVert G_k \rVert`, zero for a zero gradient. ``(K, n)``."""
        return self.scaled * self.inverse_scaled_norms[:, None]
