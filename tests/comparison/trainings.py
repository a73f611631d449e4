"""Trainings that processes can import: a small one, and ones that fail."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt import RotoGradOptimizer

HIGHER_IS_BETTER = {"left": False, "right": False}


def make_network(num_tasks: int = 2) -> tuple[nn.Module, nn.ModuleList]:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.ModuleList(nn.Linear(8, 1) for _ in range(num_tasks))


def make_losses(backbone: nn.Module, heads: nn.ModuleList) -> list[Tensor]:
    x = torch.randn(16, 4)
    z = backbone(x)
    return [5**task * (head(z) - x.roll(task, dims=1)[:, :1]).square().mean() for task, head in enumerate(heads)]


def train(seed: int, lr: float = 0.05, **options: Any) -> dict[str, float]:
    backbone, heads = make_network()
    sgd = torch.optim.SGD([*backbone.parameters(), *heads.parameters()], lr=lr)
    optimizer = RotoGradOptimizer(sgd, heads, **options)
    for _ in range(20):
        losses = make_losses(backbone, heads)
        optimizer.zero_grad()
        optimizer.step(losses)
    return {"left": losses[0].item(), "right": losses[1].item()}


def formula(seed: int, value: float = 1.0, lr: float = 0.0, **_: Any) -> dict[str, float]:
    """Return numbers without training: better for a small value, and for lr near 0.1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    loss = value + abs(lr - 0.1)
    return {"left": loss + noise[0], "right": loss * 3 + noise[1]}


def ends(seed: int, **options: Any) -> dict[str, float]:
    """End the process, as the system does when it is out of memory."""
    os._exit(1)


def threads(seed: int, **options: Any) -> dict[str, float]:
    return dict.fromkeys(HIGHER_IS_BETTER, float(torch.get_num_threads()))


class TwoArguments(Exception):  # like exceptions of users
    """An exception that pickle cannot restore."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def raises(seed: int, value: float = 1.0, **_: Any) -> dict[str, float]:
    if seed == 1 and value == 2.0:
        raise TwoArguments("out of", "luck")
    return formula(seed, value)
