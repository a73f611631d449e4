"""Losses of three kinds: one network classifies, reconstructs and regresses."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.problems.base import Metric, Outputs, Problem, Trial

NUM_CLASSES, NUM_FACTORS, NUM_INPUTS = 8, 8, 64
NUM_HIDDEN, WIDTH = 64, 32
NUM_TRAINING, NUM_TEST, BATCH = 4096, 2048, 64
SPREAD = 0.5  # of the classes, in standard deviations of a factor
NOISE = 0.5  # standard deviation, of inputs with standard deviation 1

Targets = tuple[Tensor, Tensor, Tensor]


class KindsTrial(Trial):
    """Inputs are a random function of a class and of factors, plus noise; the tasks predict class, factor and input.

    The representation has fewer features than the input, so no task can use all of it.
    """

    d = WIDTH
    num_steps = 600
    lr = 3e-3

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centers = SPREAD * torch.randn(NUM_CLASSES, NUM_FACTORS, generator=self.generator)
        self.mixing = [
            torch.randn(inputs, NUM_INPUTS, generator=self.generator) / math.sqrt(inputs)
            for inputs in (2 * NUM_FACTORS, NUM_INPUTS)
        ]
        self.train, self.held_out = self._draw(NUM_TRAINING), self._draw(NUM_TEST)

        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, WIDTH))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, outputs)) for outputs in (NUM_CLASSES, NUM_INPUTS, 1)
        )

    def _draw(self, count: int) -> Targets:
        classes = torch.randint(NUM_CLASSES, (count,), generator=self.generator)
        factors = torch.randn(count, NUM_FACTORS, generator=self.generator)
        inputs = torch.cat([self.centers[classes], factors], dim=1)
        for weights in self.mixing:
            inputs = torch.tanh(2 * inputs @ weights)
        inputs = inputs / inputs.std() + NOISE * torch.randn(inputs.shape, generator=self.generator)
        return classes, inputs, factors[:, 0]

    def batches(self) -> Iterator[tuple[Tensor, Targets]]:
        """Draw batches with replacement from the training data."""
        for _ in range(self.num_steps):
            rows = torch.randint(NUM_TRAINING, (BATCH,), generator=self.generator)
            classes, inputs, factor = (tensor[rows] for tensor in self.train)
            yield inputs, (classes, inputs, factor)

    def losses(self, outputs: list[Tensor], targets: Targets) -> list[Tensor]:
        """Return the cross entropy, the squared error of the input (summed over its dimensions) and of the factor."""
        classes, inputs, factor = targets
        return [
            F.cross_entropy(outputs[0], classes),
            (outputs[1] - inputs).square().sum(dim=1).mean(),
            F.mse_loss(outputs[2].squeeze(1), factor),
        ]

    @torch.no_grad()
    def test(self, outputs: Outputs) -> list[float]:
        """Return the accuracy in percent and the squared errors, for the input per dimension."""
        classes, inputs, _ = self.held_out
        made = outputs(inputs)
        _, reconstruction, regression = self.losses(made, self.held_out)
        right = made[0].argmax(1) == classes
        return [100 * right.float().mean().item(), reconstruction.item() / NUM_INPUTS, regression.item()]


KINDS = Problem(
    "kinds",
    (Metric("class, %", True), Metric("input, MSE", False), Metric("factor, MSE", False)),
    KindsTrial,
    middle_lr=2.0,
)
