"""Noisy gradients of equal scale that conflict in direction: pairs of tasks with opposed targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.benchmarks.problems.base import Metric, Problem
from tests.benchmarks.problems.squared_errors import SquaredErrors

NUM_PAIRS, COSINE = 2, -0.7  # the cosine is that within a pair; pairs are orthogonal
NUM_INPUTS, NUM_FEATURES, NUM_HIDDEN, WIDTH = 16, 32, 64, 16
NUM_TRAINING, NUM_TEST, BATCH = 1024, 2048, 32
NOISE = 0.5  # standard deviation, of targets with standard deviation 1


class DirectionTrial(SquaredErrors):
    """Regressions of shared random features, along directions that meet at the cosine, plus noise.

    All heads start from the same weights, so that the gradients of a pair conflict as its targets do, until the
    heads differ.
    """

    d = WIDTH
    num_steps = 600
    batch_size = BATCH
    lr = 1e-3

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.features = torch.randn(NUM_INPUTS, NUM_FEATURES, generator=self.generator) / math.sqrt(NUM_INPUTS)
        frame = torch.linalg.qr(torch.randn(NUM_FEATURES, 2 * NUM_PAIRS, generator=self.generator)).Q
        first, rest = frame.chunk(2, dim=1)
        self.directions = torch.cat([first, COSINE * first + math.sqrt(1 - COSINE**2) * rest], dim=1)
        self.train = self._draw(NUM_TRAINING, NOISE)
        self.held_out = self._draw(NUM_TEST, noise=0.0)

        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, WIDTH))
        self.heads = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, 1)) for _ in range(2 * NUM_PAIRS))
        for head in self.heads:
            head.load_state_dict(self.heads[0].state_dict())

    def _draw(self, count: int, noise: float) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, NUM_INPUTS, generator=self.generator)
        targets = torch.tanh(2 * inputs @ self.features) @ self.directions
        targets = (targets - targets.mean(0)) / targets.std(0)
        return inputs, targets + noise * torch.randn(targets.shape, generator=self.generator)


DIRECTION = Problem("direction", tuple(Metric(f"MSE {task}", False) for task in range(2 * NUM_PAIRS)), DirectionTrial)
