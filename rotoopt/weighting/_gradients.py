"""What one backward pass measures at the representation: K gradients, their norms and cosines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotoopt._torch.processes import Processes

if TYPE_CHECKING:
    from typing_extensions import Self

# 2**e for every e in between is a normal float32 number, so scaling by it is exact.
MIN_EXPONENT, MAX_EXPONENT = -126, 126


def task_mask(tasks: set[int], like: Tensor) -> Tensor:
    """Return ``tasks`` as a mask on the device of ``like``, made without a copy from the host. Shape ``(K,)``, bool."""
    mask = torch.ones_like(like, dtype=torch.bool)
    for task in set(range(len(mask))) - tasks:
        mask[task] = False
    return mask


def all_finite(norms: Tensor) -> Tensor:
    """Return whether all of ``norms`` are finite. Shape ``()``, bool."""
    return (norms < torch.inf).all()  # NaN is not; `isfinite` takes four operations


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
        tasks: The tasks that are present, in order; None where only the device knows.
        present: The same as a mask. Shape ``(K,)``, bool.
        gram: Inner products :math:`\langle \hat G_i, \hat G_j \rangle`. Shape ``(K, K)``.
    """

    scaled: Tensor
    scale: Tensor
    tasks: tuple[int, ...] | None
    present: Tensor
    gram: Tensor

    @classmethod
    def of(cls, grads: Tensor, tasks: tuple[int, ...], present: Tensor) -> TaskGradients:
        """Measure ``grads``, shape ``(K, n)``, which is scaled in place."""
        # At least the largest absolute value. On a CPU, `vector_norm` with inf takes over ten times as long.
        peak = torch.hypot(grads.amax(1), grads.amin(1)) if grads.shape[1] else grads.sum(1)  # a batch may be empty
        scale = torch.pow(2.0, torch.frexp(peak).exponent.clamp_(MIN_EXPONENT, MAX_EXPONENT)).to(grads.dtype)
        scaled = grads.div_(scale[:, None])
        return TaskGradients(scaled, scale, tasks, present, scaled @ scaled.mT)

    def divided_by(self, divisor: Tensor | float) -> Self:
        """Return :math:`G_k / c` with ``divisor`` c."""
        return replace(self, scale=self.scale / divisor)

    @cached_property
    def num_present(self) -> Tensor:
        """Number of present tasks. Shape ``()``."""
        return self.present.sum()

    @cached_property
    def scaled_norms(self) -> Tensor:
        r"""Norms :math:`\lVert \hat G_k \rVert`. Shape ``(K,)``."""
        return self.gram.diagonal().sqrt()

    @cached_property
    def norms(self) -> Tensor:
        r"""Frobenius norms :math:`\lVert G_k \rVert` of the whole batch; zero for an absent task. Shape ``(K,)``."""
        return self.scaled_norms * self.scale

    @cached_property
    def cosines(self) -> Tensor:
        """Cosines between the gradients, zero where one of them is zero. Shape ``(K, K)``."""
        norms = self.scaled_norms
        return (self.gram / norms.outer(norms)).nan_to_num_(0.0)

    @cached_property
    def inverse_scaled_norms(self) -> Tensor:
        r""":math:`1 / \lVert \hat G_k \rVert`, zero for a zero gradient. Shape ``(K,)``."""
        return self.scaled_norms.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)

    def rows(self) -> Tensor:
        """Return the gradients of the present tasks, unscaled. Shape ``(|P|, n)``."""
        grads = self.scaled * self.scale[:, None]
        if self.tasks is None:
            return grads[self.present]
        return grads if len(self.tasks) == len(grads) else grads[list(self.tasks)]

    def aggregate(self, aggregator: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the result of ``aggregator`` on the ``(|P|, n)`` gradients of the present tasks. Shape ``(n,)``."""
        return aggregator(self.rows())

    def combine(self, weights: Tensor) -> Tensor:
        r"""Return :math:`\sum_k w_k G_k` with ``weights`` w, shape ``(K,)``, finite. Shape ``(n,)``."""
        return torch.mv(self.scaled.mT, weights * self.scale)

    def divided(self, norms: Tensor) -> Tensor:
        r"""Return :math:`G_k / n_k` with ``norms`` n, shape ``(K,)``; zero where that is zero. Shape ``(K, n)``."""
        return self.scaled * (self.scale / norms).nan_to_num_(0.0, posinf=0.0)[:, None]

    def directions(self) -> Tensor:
        r"""Return the unit gradients :math:`U_k = G_k / \lVert G_k \rVert`, zero for a zero gradient. ``(K, n)``."""
        return self.scaled * self.inverse_scaled_norms[:, None]


@dataclass(frozen=True)
class JoinedGradients(TaskGradients):
    """The gradients of the joined batch: ``scaled`` holds the samples of this process, the rest describes all samples.

    Attributes:
        processes: The processes that share the batch.
    """

    processes: Processes

    @classmethod
    def join(cls, own: TaskGradients, processes: Processes) -> JoinedGradients:
        """Join the gradients of all processes, by exchanging K (K + 2) numbers."""
        K = len(own.scale)
        gathered = processes.gather(torch.cat([own.gram.flatten(), own.scale, own.present]))
        grams, scales, present = torch.split(gathered, [K * K, K, K], dim=1)
        grams = grams.view(-1, K, K)
        # The scale of a task without a gradient on a process is meaningless.
        zero = grams.diagonal(dim1=1, dim2=2) == 0
        scale = torch.where(zero, 0.0, scales).amax(0)
        scale = torch.where(scale > 0, scale, 1.0)
        ratios = scales / scale
        gram = (ratios[:, :, None] * grams * ratios[:, None, :]).sum(0)
        return cls(own.scaled.mul_((own.scale / scale)[:, None]), scale, None, present.any(0), gram, processes)

    def aggregate(self, aggregator: Callable[[Tensor], Tensor]) -> Tensor:
        """Call the aggregator with the samples of all processes, and return the part of this one; synchronizes."""
        own = self.rows()
        sizes = [int(size) for size in self.processes.gather(torch.tensor([own.shape[1]], device=own.device))]
        padded = torch.nn.functional.pad(own, (0, max(sizes) - own.shape[1]))
        gathered = self.processes.gather(padded)
        joined = torch.cat([rows[:, :size] for rows, size in zip(gathered, sizes, strict=True)], dim=1)
        start = sum(sizes[: self.processes.rank])
        return aggregator(joined)[start : start + own.shape[1]]
