"""A model that is wired to an optimizer, correctly or not, as input of the checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Adam

from rotoopt import RotoGradOptimizer

Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None]


@dataclass
class Wired:
    """A model, its optimizer, and the losses of one batch."""

    model: nn.Module
    optimizer: RotoGradOptimizer
    losses: Callable[[], Losses]

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            self.optimizer.step(self.losses())


def wire(model: nn.Module, losses: Callable[[], Losses], **options: Any) -> Wired:
    """Wire ``model`` to Adam; ``options`` are passed to the optimizer."""
    return Wired(model, RotoGradOptimizer(Adam(model.parameters(), lr=0.01), **options), losses)
