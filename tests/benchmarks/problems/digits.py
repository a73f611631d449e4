"""Digit pairs: the problem of ``examples/digit_pairs.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks.problems.base import Metric, Outputs, Problem, Trial

sys.path.append(str(Path(__file__).parents[3] / "examples"))  # examples are scripts, not a package

from digit_pairs import DigitPairNet
from digit_pairs_data import TASKS, load_pairs

NUM_PAIRS, NUM_EPOCHS = 4480, 20  # half of the example's: 35 batches per epoch


class DigitTrial(Trial):
    """The network and the data of the example."""

    d = 64
    lr = 1e-3

    def __init__(self, seed: int) -> None:
        self.train, self.held_out = load_pairs(NUM_PAIRS, seed)
        self.num_steps = NUM_EPOCHS * self.train.num_batches
        torch.manual_seed(seed)
        net = DigitPairNet(TASKS)
        self.backbone, self.heads = net.backbone, net.heads

    def batches(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Iterate over the pairs several times, as in the example."""
        for epoch in range(NUM_EPOCHS):
            yield from self.train.batches(epoch)

    def losses(self, outputs: list[Tensor], targets: dict[str, Tensor]) -> list[Tensor]:
        """Return the losses of the example."""
        return [task.loss(output, targets[task.name]) for task, output in zip(TASKS, outputs, strict=True)]

    @torch.no_grad()
    def test(self, outputs: Outputs) -> list[float]:
        """Return the example's metrics on pairs of unseen digits."""
        pairs = zip(TASKS, outputs(self.held_out.images), strict=True)
        return [task.metric(output, self.held_out.targets[task.name]).item() for task, output in pairs]


DIGITS = Problem("digits", tuple(Metric(task.name, task.higher_is_better) for task in TASKS), DigitTrial, middle_lr=2.0)
