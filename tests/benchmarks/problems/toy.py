"""The non-convex toy problem of the RotoGrad paper: one point, two tasks with their optima at opposite corners."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.benchmarks.problems.base import Metric, Outputs, Problem, Trial

OPTIMA = (1.5, -1.5)  # in both coordinates


def toy_loss(output: Tensor, optimum: float) -> Tensor:
    r"""Return :math:`\sum_i |u_i| - \sin(3 u_i) / u_i` with u the distance to the optimum, where it is -6.

    By ``sinc``: the official code's quotient is NaN exactly at the optimum.
    """
    u = output - optimum
    return (u.abs() - 3 * torch.sinc(3 * u / math.pi)).sum(dim=-1).mean()


class ToyTrial(Trial):
    """The losses are functions of the rotated representation itself: heads without parameters.

    The paper trains on 256 copies of one point with the mean loss; one copy has the same gradients.
    """

    d = 2
    num_steps = 800
    lr = 1e-3
    normalize_losses = True

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2))
        self.heads = nn.ModuleList(nn.Identity() for _ in OPTIMA)
        self.point = torch.zeros(1, 2)

    def optimizer(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return SGD."""
        return torch.optim.SGD(params, lr=lr)

    def batches(self) -> Iterator[tuple[Tensor, None]]:
        """Yield the same point in every step."""
        for _ in range(self.num_steps):
            yield self.point, None

    def losses(self, outputs: list[Tensor], targets: None) -> list[Tensor]:
        """Return both losses."""
        return [toy_loss(output, optimum) for output, optimum in zip(outputs, OPTIMA, strict=True)]

    @torch.no_grad()
    def test(self, outputs: Outputs) -> list[float]:
        """Return the mean and the worst of the two losses."""
        losses = torch.stack(self.losses(outputs(self.point), None))
        return [losses.mean().item(), losses.max().item()]


TOY = Problem(
    "toy",
    (Metric("mean loss", False), Metric("worst loss", False)),
    ToyTrial,
    rotation_lrs=(1e-2, 1e-1),
)
