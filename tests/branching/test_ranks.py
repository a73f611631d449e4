"""For any model, two processes with half of the batch each equal one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from rotoopt import RotoGradOptimizer, RotoGradWeighting
from rotoopt.testing._branching import BRANCHING
from rotoopt.testing._branching.model import Branching, Sizes, built, inputs
from tests.branching.twins import NAMES, WAYS
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.distributed

RANDOM = ["dropout_per_head", "variational"]  # two processes draw other random numbers than one
SIZE = 4  # of the batch of one process


class Whole(nn.Module):
    """The model as one module, whose outputs are its losses."""

    def __init__(self, model: Branching) -> None:
        super().__init__()
        self.parts = model.modules()
        self._losses = model.losses

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self._losses(x)


def train(rank: int | None, name: str, way: str, halves: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Return parameters, and the weights of all steps.

    Args:
        rank: That of the process; None for one with all of the batch.
        name: The name of the model.
        way: How the losses are back-propagated.
        halves: Whether each process has half of the batch. Otherwise, both have all of it, and draw the same numbers.
    """
    model = built(BRANCHING[NAMES.index(name)], Sizes(), 0, torch.float64)
    whole: Any = Whole(model)
    options: dict[str, Any] = {"turn_every": 1, "rotation_lr": 0.05, **model.options}
    if not halves:  # to the default weights, and to rotations, samples that are equal look like signal
        options.update(weighting=RotoGradWeighting(), rotation_lr=0.0)
    optimizer = RotoGradOptimizer(SGD(whole.parameters(), lr=0.05, momentum=0.9), model.heads, **options)
    whole = whole if rank is None else DistributedDataParallel(whole)
    weights = []
    for step in range(5):
        x = inputs(step, 2 * SIZE, torch.float64)
        torch.manual_seed(step)
        optimizer.zero_grad()
        WAYS[way](optimizer, whole(x[rank * SIZE : (rank + 1) * SIZE] if halves and rank is not None else x))
        optimizer.step()
        weights.append(optimizer.task_weights)
    return [param.detach() for param in model.modules().parameters()], weights


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM])
def test_two_processes_are_one(ranks: Ranks, name: str, way: str) -> None:
    first, second = ranks.run(train, name, way)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    torch.testing.assert_close(first, train(None, name, way), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RANDOM)
def test_two_processes_that_draw_the_same_are_one(ranks: Ranks, name: str, way: str) -> None:
    first, second = ranks.run(train, name, way, False)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    torch.testing.assert_close(first, train(None, name, way, False), rtol=1e-6, atol=1e-9)
