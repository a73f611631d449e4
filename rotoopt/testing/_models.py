"""A small network for several tasks, with a representation of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rotoopt.testing._sampler import Sampler

Batch = tuple[Tensor, Tensor]  # inputs (B, inputs) and targets (K, B, outputs)


class Network(nn.Module):
    """A backbone that computes representations of one shape, and K heads that read all of it.

    Uses tanh, because float32 and float64 differ by more than rounding errors at the kink of a ReLU.

    Args:
        shape: Shape of the representation of one sample.
        num_tasks: K.
        inputs: Size of an input.
        outputs: Size of a prediction.
    """

    def __init__(self, shape: Sequence[int], num_tasks: int, *, inputs: int = 5, outputs: int = 3) -> None:
        super().__init__()
        n = math.prod(shape)
        self.backbone = nn.Sequential(nn.Linear(inputs, n), nn.Tanh(), nn.Unflatten(1, tuple(shape)))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Flatten(), nn.Linear(n, 6), nn.Tanh(), nn.Linear(6, outputs)) for _ in range(num_tasks)
        )

    def losses(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Return one squared error per task, and the representation."""
        x, targets = batch
        z = self.backbone(x)
        heads = zip(self.heads, targets, strict=True)
        return [(head(z) - target).square().mean() for head, target in heads], z


def network(seed: int, shape: Sequence[int], num_tasks: int, dtype: torch.dtype) -> Network:
    """Return the network with weights from ``seed``; torch's global generator does not change."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Network(shape, num_tasks).to(dtype)


def batches(seed: int, n: int, num_tasks: int, dtype: torch.dtype, *, size: int = 6) -> list[Batch]:
    """Draw ``n`` batches for a :class:`Network`: inputs ``(size, 5)`` and targets ``(K, size, 3)``."""
    sampler = Sampler(seed, dtype)
    return [(sampler.normal(size, 5), sampler.normal(num_tasks, size, 3)) for _ in range(n)]
