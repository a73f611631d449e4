"""Digit pairs: the problem of ``examples/digit_pairs.py``, with bottlenecks of several widths."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.benchmarks.problems.base import Metric, Outputs, Problem, Trial

sys.path.append(str(Path(__file__).parents[3] / "examples"))  # examples are scripts, not a package

from digit_pairs import DigitPairNet
from digit_pairs_data import TASKS, load_pairs

NUM_PAIRS = 4480  # half of the example's: 35 batches per epoch


class DigitTrial(Trial):
    """The network and the data of the example."""

    lr = 1e-3

    def __init__(self, seed: int, *, width: int, num_epochs: int) -> None:
        self.train, self.held_out = load_pairs(NUM_PAIRS, seed)
        self.num_epochs = num_epochs
        self.num_steps = num_epochs * self.train.num_batches
        self.d = width
        torch.manual_seed(seed)
        net = DigitPairNet(TASKS)
        if width != 64:  # the example's own
            last = net.backbone[-1]
            assert isinstance(last, nn.Linear)
            net.backbone[-1] = nn.Linear(last.in_features, width)
            net.heads = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(width, task.num_outputs)) for task in TASKS)
        self.backbone, self.heads = net.backbone, net.heads

    def batches(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Pass over the pairs several times, as the example does."""
        for epoch in range(self.num_epochs):
            yield from self.train.batches(epoch)

    def losses(self, outputs: list[Tensor], targets: dict[str, Tensor]) -> list[Tensor]:
        """Return those of the example."""
        return [task.loss(output, targets[task.name]) for task, output in zip(TASKS, outputs, strict=True)]

    @torch.no_grad()
    def test(self, outputs: Outputs) -> list[float]:
        """Return the example's metrics on pairs of unseen digits."""
        pairs = zip(TASKS, outputs(self.held_out.images), strict=True)
        return [task.metric(output, self.held_out.targets[task.name]).item() for task, output in pairs]


def _problem(width: int, num_epochs: int, methods: str) -> Problem:
    metrics = tuple(Metric(task.name, task.higher_is_better) for task in TASKS)
    make = partial(DigitTrial, width=width, num_epochs=num_epochs)
    return Problem(f"digits d={width}", metrics, make, methods, middle_lr=2.0)


# Wide: a turn of five 512 x 512 rotations costs as much as the rest of many steps, so there are fewer of them.
DIGITS = (
    _problem(64, num_epochs=20, methods="all"),
    _problem(8, num_epochs=20, methods="few"),
    _problem(512, num_epochs=8, methods="few"),
)
