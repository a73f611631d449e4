"""Two heads of one kind behind a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD

from rotoopt import RotoGradOptimizer

D = 6


def wrapped(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Linear, list[Any], RotoGradOptimizer]:
    backbone, heads = nn.Linear(5, D), [make(), make()]
    params = [*backbone.parameters(), *nn.ModuleList(heads).parameters()]
    options = {"init": "haar", "rotation_size": D, **options}
    return backbone, heads, RotoGradOptimizer(SGD(params, lr=0.1), heads, **options)


def step(optimizer: RotoGradOptimizer, outputs: Sequence[Tensor]) -> None:
    optimizer.zero_grad()
    optimizer.step([output.square().mean() for output in outputs])
