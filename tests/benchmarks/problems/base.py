"""What a problem of the quality study is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt import RotoGradOptimizer


@dataclass(frozen=True)
class Metric:
    """One number that a trained network is judged by."""

    name: str
    higher_is_better: bool


class Trial(ABC):
    """One network with fresh weights, its data and its optimizer; everything follows from the seed."""

    heads: nn.ModuleList | None  # None: functional heads, fed by `optimizer.rotate`
    num_tasks: int
    num_steps: int
    optimizer: Optimizer
    dim = -1
    normalize_losses = False

    @abstractmethod
    def batches(self, optimizer: RotoGradOptimizer) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield the losses and the representation of `num_steps` training batches, one after another.

        The caller trains in between. Batches follow from the seed, so every method sees the same ones.
        """

    @abstractmethod
    def test(self, optimizer: RotoGradOptimizer) -> list[float]:
        """Return the metrics of the problem, on data that was not trained on."""


@dataclass(frozen=True)
class Problem:
    """A family of trials, one per seed."""

    name: str
    metrics: tuple[Metric, ...]
    make: Callable[[int], Trial]
    methods: str  # the name of the set of methods that are worth their time here
    relative: bool = True  # whether changes are given in percent: not where a metric may be zero
