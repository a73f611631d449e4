"""Tasks that converge at different rates: one is learned in a few dozen steps, two still improve at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.benchmarks.problems.base import Metric, Problem
from tests.benchmarks.problems.squared_errors import SquaredErrors

NAMES = ("linear", "wave", "product")
NUM_INPUTS, NUM_HIDDEN, WIDTH = 12, 64, 32
NUM_TEST, BATCH = 2048, 64
FREQUENCY = 2.0  # of the wave, in radians per standard deviation
NOISE = 0.5  # standard deviation, of targets with standard deviation 1


class RatesTrial(SquaredErrors):
    """A linear function, a wave and a product, each along its own random directions.

    Every batch is new, so the errors are those of unfinished training. The test targets also have noise: without it,
    the relative change of the error of the linear function would be a ratio of two small numbers.
    """

    d = WIDTH
    num_steps = 500
    lr = 3e-3

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.frame = torch.linalg.qr(torch.randn(NUM_INPUTS, NUM_INPUTS, generator=self.generator)).Q
        self.held_out = self._draw(NUM_TEST)

        torch.manual_seed(seed)
        self.backbone = nn.Sequential(
            nn.Linear(NUM_INPUTS, NUM_HIDDEN),
            nn.ReLU(),
            nn.Linear(NUM_HIDDEN, NUM_HIDDEN),
            nn.ReLU(),
            nn.Linear(NUM_HIDDEN, WIDTH),
        )
        self.heads = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, 1)) for _ in NAMES)

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, NUM_INPUTS, generator=self.generator)
        first, second, *others = (inputs @ self.frame).unbind(dim=1)
        wave = math.sqrt(2) * torch.sin(FREQUENCY * second)
        targets = torch.stack([first, wave, others[0] * others[1]], dim=1)  # of variance 1
        return inputs, targets + NOISE * torch.randn(targets.shape, generator=self.generator)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw new batches."""
        for _ in range(self.num_steps):
            yield self._draw(BATCH)


RATES = Problem("rates", tuple(Metric(f"{name}, MSE", False) for name in NAMES), RatesTrial)
