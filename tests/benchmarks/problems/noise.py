"""Classifications and a task with random labels, which cannot be learned; its metric is not counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.problems.base import Metric, Outputs, Problem, Trial

NUM_TASKS, NUM_CLASSES = 3, 4  # without the random one, which has as many classes
NUM_INPUTS, NUM_TEACHER, NUM_HIDDEN, WIDTH = 16, 16, 64, 8
NUM_TRAINING, NUM_TEST, BATCH = 512, 2048, 64


class NoiseTrial(Trial):
    """Classifications by teacher networks, and one with a random label for every training sample.

    The data, their order and all other weights are the same with and without the random task.
    """

    d = WIDTH
    num_steps = 600
    lr = 3e-3

    def __init__(self, seed: int, *, with_noise: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        features = torch.randn(NUM_INPUTS, NUM_TEACHER, generator=self.generator) / math.sqrt(NUM_INPUTS)
        readouts = torch.randn(NUM_TASKS, NUM_TEACHER, NUM_CLASSES, generator=self.generator)
        inputs = torch.randn(NUM_TRAINING + NUM_TEST, NUM_INPUTS, generator=self.generator)
        labels = (torch.tanh(2 * inputs @ features) @ readouts).argmax(dim=-1)
        random = torch.randint(NUM_CLASSES, (1, len(inputs)), generator=self.generator)
        labels = torch.cat([labels, random])[: NUM_TASKS + with_noise]
        self.train = inputs[:NUM_TRAINING], labels[:, :NUM_TRAINING]
        self.held_out = inputs[NUM_TRAINING:], labels[:NUM_TASKS, NUM_TRAINING:]

        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, WIDTH))
        self.heads = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, NUM_CLASSES)) for _ in labels)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw batches with replacement from the training data."""
        inputs, labels = self.train
        for _ in range(self.num_steps):
            rows = torch.randint(NUM_TRAINING, (BATCH,), generator=self.generator)
            yield inputs[rows], labels[:, rows]

    def losses(self, outputs: list[Tensor], targets: Tensor) -> list[Tensor]:
        """Return the cross entropies; the random task is the last one."""
        return [F.cross_entropy(output, labels) for output, labels in zip(outputs, targets, strict=True)]

    @torch.no_grad()
    def test(self, outputs: Outputs) -> list[float]:
        """Return the errors in percent, without that of the random task."""
        inputs, targets = self.held_out
        pairs = zip(outputs(inputs)[:NUM_TASKS], targets, strict=True)
        return [100 * (output.argmax(1) != labels).float().mean().item() for output, labels in pairs]


def _problem(name: str, *, with_noise: bool) -> Problem:
    metrics = tuple(Metric(f"task {task}, % wrong", False) for task in range(NUM_TASKS))
    return Problem(name, metrics, partial(NoiseTrial, with_noise=with_noise))


LABEL_NOISE = _problem("label noise", with_noise=True)
WITHOUT_LABEL_NOISE = _problem("label noise, without", with_noise=False)  # shows what the random task costs
