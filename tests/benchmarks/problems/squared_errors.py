"""Trials of regressions: batches from a fixed set of training data, and squared errors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.benchmarks.problems.base import Outputs, Trial


class SquaredErrors(Trial):
    """A trial with one column of targets, and one head with one output, per task.

    Attributes:
        generator: Draws the batches.
        train: Inputs and targets.
        held_out: The same, for the test.
        batch_size: Number of samples of a batch.
    """

    generator: torch.Generator
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    batch_size: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw batches with replacement from the training data."""
        inputs, targets = self.train
        for _ in range(self.num_steps):
            rows = torch.randint(len(inputs), (self.batch_size,), generator=self.generator)
            yield inputs[rows], targets[rows]

    def errors(self, outputs: list[Tensor], targets: Tensor) -> list[Tensor]:
        """Return the mean squared error of every task."""
        pairs = zip(outputs, targets.mT, strict=True)
        return [(output.squeeze(1) - target).square().mean() for output, target in pairs]

    def losses(self, outputs: list[Tensor], targets: Tensor) -> list[Tensor]:
        """Return the mean squared errors."""
        return self.errors(outputs, targets)

    @torch.no_grad()
    def test(self, outputs: Outputs) -> list[float]:
        """Return the mean squared errors on held-out data, including the noise of the targets."""
        inputs, targets = self.held_out
        return [error.item() for error in self.errors(outputs(inputs), targets)]
