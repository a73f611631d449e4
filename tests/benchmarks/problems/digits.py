"""Digit pairs: the problem of ``examples/digit_pairs.py``, with bottlenecks of several widths."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rotoopt import RotoGradOptimizer
from tests.benchmarks.problems.base import Metric, Problem, Trial

sys.path.append(str(Path(__file__).parents[3] / "examples"))  # examples are scripts, not a package

from digit_pairs import DigitPairNet
from digit_pairs_data import TASKS, load_pairs

NUM_PAIRS = 4480  # half of the example's: 35 batches per epoch


class DigitTrial(Trial):
    """The network and the data of the example."""

    num_tasks = len(TASKS)

    def __init__(self, seed: int, *, width: int, num_epochs: int) -> None:
        self.train, self.held_out = load_pairs(NUM_PAIRS, seed)
        self.num_epochs = num_epochs
        self.num_steps = num_epochs * self.train.num_batches
        torch.manual_seed(seed)
        self.net = DigitPairNet(TASKS)
        if width != 64:  # the example's own
            last = self.net.backbone[-1]
            assert isinstance(last, nn.Linear)
            self.net.backbone[-1] = nn.Linear(last.in_features, width)
            self.net.heads = nn.ModuleList(
                nn.Sequential(nn.ReLU(), nn.Linear(width, task.num_outputs)) for task in TASKS
            )
        self.heads = self.net.heads
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def batches(self, optimizer: RotoGradOptimizer) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Pass over the pairs several times, as the example does."""
        for epoch in range(self.num_epochs):
            for images, targets in self.train.batches(epoch):
                rep = self.net.backbone(images)
                yield self.net.losses(rep, targets), rep

    def test(self, optimizer: RotoGradOptimizer) -> list[float]:
        """Return the example's metrics on pairs of unseen digits."""
        return self.net.metrics(self.held_out).tolist()


def _problem(width: int, num_epochs: int, methods: str) -> Problem:
    metrics = tuple(Metric(task.name, task.higher_is_better) for task in TASKS)
    make = partial(DigitTrial, width=width, num_epochs=num_epochs)
    return Problem(f"digits d={width}", metrics, make, methods)


# Wide: a turn of five 512 x 512 rotations costs as much as the rest of many steps, so there are fewer of them.
DIGITS = (
    _problem(64, num_epochs=20, methods="all"),
    _problem(8, num_epochs=20, methods="few"),
    _problem(512, num_epochs=8, methods="wide"),
)
