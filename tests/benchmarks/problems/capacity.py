"""Many tasks with few features: regressions that cannot all be represented."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.benchmarks.problems.base import Metric, Problem
from tests.benchmarks.problems.squared_errors import SquaredErrors

NUM_TASKS, WIDTH = 12, 6
NUM_INPUTS, NUM_TEACHER, NUM_HIDDEN = 12, 4, 64
NUM_TRAINING, NUM_TEST, BATCH = 2048, 2048, 64
NOISE = 0.5  # standard deviation, of targets with standard deviation 1


class CapacityTrial(SquaredErrors):
    """Every target is computed by a separate teacher network, and all have the same scale.

    One task can be represented by the features; the twelve have to share them. Heads begin with tanh: with a ReLU,
    some of the six features would die, depending on the seed.
    """

    d = WIDTH
    num_steps = 400
    batch_size = BATCH
    lr = 3e-3

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        shape = (NUM_TASKS, NUM_INPUTS, NUM_TEACHER)
        self.features = torch.randn(shape, generator=self.generator) / math.sqrt(NUM_INPUTS)
        self.readouts = torch.randn(NUM_TASKS, NUM_TEACHER, 1, generator=self.generator)
        self.train = self._draw(NUM_TRAINING)
        self.held_out = self._draw(NUM_TEST)

        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, WIDTH))
        self.heads = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, 1)) for _ in range(NUM_TASKS))

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, NUM_INPUTS, generator=self.generator)
        targets = (torch.tanh(2 * inputs @ self.features) @ self.readouts).squeeze(2).mT
        targets = (targets - targets.mean(0)) / targets.std(0)
        return inputs, targets + NOISE * torch.randn(targets.shape, generator=self.generator)


CAPACITY = Problem(
    "capacity",
    tuple(Metric(f"MSE {task}", False) for task in range(NUM_TASKS)),
    CapacityTrial,
    middle_lr=2.0,
)
