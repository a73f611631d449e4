"""How many operations a step adds to a plain one: on a GPU each is a kernel launch, whatever its size."""

import statistics

import pytest
import torch
from torch import nn
from torch.optim import SGD

from rotoopt import RotoGradOptimizer
from tests.operations import Count

# Four per task: times R and R^T, its norm, its weight. The others are on K numbers, or on the combined gradient.
MEDIAN, PER_TASK = 37, 4
# One more per task than in a plain step: R^T g_k is written to where the gradients meet, and autograd adds up none.
WORST, FIRST, PER_TURNING_TASK = 151, 232, 1
NUM_SAMPLES, SIZE = 8, 64


def operations(num_tasks: int, *, wrapped: bool) -> list[int]:
    """Return the number of operations of every step of a training."""
    backbone = nn.Sequential(nn.Linear(16, SIZE), nn.ReLU())
    heads = nn.ModuleList(nn.Linear(SIZE, 1) for _ in range(num_tasks))
    bare = SGD([*backbone.parameters(), *heads.parameters()], lr=0.01)
    optimizer = RotoGradOptimizer(bare, heads) if wrapped else bare
    counts = []
    for _ in range(40):
        x = torch.randn(NUM_SAMPLES, 16)
        with Count() as count:
            z = backbone(x)
            losses = [head(z).square().mean() for head in heads]
            optimizer.zero_grad()
            if isinstance(optimizer, RotoGradOptimizer):
                optimizer.step(losses, z)
            else:
                torch.autograd.backward(losses)
                optimizer.step()
        counts.append(count.found.total())
    return counts


@pytest.mark.parametrize("num_tasks", [5, 20])
def test_added_operations(num_tasks: int) -> None:
    """Exact numbers, so that changes are detected: the median step after the burn-in, the worst one, and the first."""
    pairs = zip(operations(num_tasks, wrapped=True), operations(num_tasks, wrapped=False), strict=True)
    added = [own - plain for own, plain in pairs]
    assert statistics.median(added[20:]) == MEDIAN + PER_TASK * num_tasks
    # With more samples than features, in all tasks, the metric is inverted instead of solved with.
    turning = PER_TURNING_TASK * num_tasks + (NUM_SAMPLES * (num_tasks + 1) > SIZE)
    assert max(added[1:]) == WORST + turning
    assert added[0] == FIRST + turning
