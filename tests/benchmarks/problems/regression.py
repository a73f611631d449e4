"""Synthetic regressions whose tasks differ in scale and conflict in direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.benchmarks.problems.base import Metric, Problem
from tests.benchmarks.problems.squared_errors import SquaredErrors

LOSS_SCALES = (0.01, 0.1, 1.0, 10.0)
NUM_INPUTS, NUM_FEATURES, NUM_HIDDEN = 16, 32, 64
NUM_TRAINING, NUM_TEST, BATCH = 1024, 2048, 64
WIDTH, NUM_STEPS = 64, 600
COSINE = -0.5  # of teacher directions
NOISE = 0.3  # standard deviation, of targets with standard deviation 1


class RegressionTrial(SquaredErrors):
    r"""Four tasks :math:`y_k = \tanh(3 \langle a_k, \phi(x) \rangle)` of shared random features, plus noise.

    The teacher directions of tasks 0 and 2, and of tasks 1 and 3, have that cosine; the two planes are orthogonal.
    (Four directions with the same cosine between all pairs exist only down to -1/3.) So the tasks that agree or
    conflict have losses of very different scale.
    """

    batch_size = BATCH
    num_steps = NUM_STEPS
    d = WIDTH
    lr = 3e-3

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        features = torch.randn(NUM_INPUTS, NUM_FEATURES, generator=self.generator) / math.sqrt(NUM_INPUTS)
        frame = torch.linalg.qr(torch.randn(NUM_FEATURES, 4, generator=self.generator)).Q
        first = frame[:, :2]
        self.directions = torch.cat([first, COSINE * first + math.sqrt(1 - COSINE**2) * frame[:, 2:]], dim=1)
        self.features = features
        self.train = self._draw(NUM_TRAINING, NOISE)
        self.held_out = self._draw(NUM_TEST, noise=0.0)

        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, WIDTH))
        self.heads = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, 1)) for _ in LOSS_SCALES)

    def _draw(self, count: int, noise: float) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, NUM_INPUTS, generator=self.generator)
        projections = torch.tanh(2 * inputs @ self.features) @ self.directions
        targets = torch.tanh(3 * projections)
        targets = (targets - targets.mean(0)) / targets.std(0)
        return inputs, targets + noise * torch.randn(targets.shape, generator=self.generator)

    def losses(self, outputs: list[Tensor], targets: Tensor) -> list[Tensor]:
        """Return the mean squared errors, scaled."""
        errors = self.errors(outputs, targets)
        return [scale * error for scale, error in zip(LOSS_SCALES, errors, strict=True)]


REGRESSION = Problem(
    "regression",
    tuple(Metric(f"MSE, loss x {scale:g}", higher_is_better=False) for scale in LOSS_SCALES),
    RegressionTrial,
)
