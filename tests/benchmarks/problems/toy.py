"""The non-convex toy problem of the RotoGrad paper: one point, two tasks with their optima at opposite corners."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rotoopt import RotoGradOptimizer
from tests.benchmarks.problems.base import Metric, Problem, Trial

OPTIMA = (1.5, -1.5)  # in both coordinates


def toy_loss(output: Tensor, optimum: float) -> Tensor:
    r"""Return :math:`\sum_i |u_i| - \sin(3 u_i) / u_i` with u the distance to the optimum, where it is -6.

    By ``sinc``: the official code's quotient is NaN exactly at the optimum.
    """
    u = output - optimum
    return (u.abs() - 3 * torch.sinc(3 * u / math.pi)).sum(dim=-1).mean()


class ToyTrial(Trial):
    """The losses act on the rotated representation itself: heads without parameters.

    The paper trains on 256 copies of one point with the mean loss; one copy has the same gradients.
    """

    heads = None
    num_tasks = len(OPTIMA)
    num_steps = 800
    normalize_losses = True

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3)
        self.point = torch.zeros(1, 2)

    def _losses(self, rep: Tensor, optimizer: RotoGradOptimizer) -> list[Tensor]:
        rotated = optimizer.rotate(rep)
        return [toy_loss(output, optimum) for output, optimum in zip(rotated, OPTIMA, strict=True)]

    def batches(self, optimizer: RotoGradOptimizer) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield the one point again and again."""
        for _ in range(self.num_steps):
            rep = self.net(self.point)
            yield self._losses(rep, optimizer), rep

    @torch.no_grad()
    def test(self, optimizer: RotoGradOptimizer) -> list[float]:
        """Return the mean and the worst of the two losses."""
        losses = torch.stack(self._losses(self.net(self.point), optimizer))
        return [losses.mean().item(), losses.max().item()]


TOY = Problem(
    "toy",
    (Metric("mean loss", False), Metric("worst loss", False)),
    ToyTrial,
    methods="toy",
    relative=False,
)
