"""Base classes of the problems of the quality studies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Outputs = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Metric:
    """A metric of a trained network."""

    name: str
    higher_is_better: bool


class Trial(ABC):
    """A new network, its data and its optimizer; everything is determined by the seed.

    Attributes:
        backbone: Computes the representation.
        heads: One per task.
        d: Number of features of the representation.
        dim: Their dimension.
        post_shape: Dimensions behind them in the shape of the representation.
        num_steps: Number of batches.
        lr: Learning rate of the network; if `decays`, a cosine schedule lowers it to zero.
    """

    backbone: nn.Module
    heads: nn.ModuleList
    d: int
    num_steps: int
    lr: float
    dim = -1
    post_shape: tuple[int, ...] = ()
    decays = False
    normalize_losses = False

    def optimizer(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Return the problem's optimizer of ``params``."""
        return torch.optim.Adam(params, lr=lr)

    @abstractmethod
    def batches(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield inputs and targets of `num_steps` training batches, which are determined by the seed alone."""

    @abstractmethod
    def losses(self, outputs: list[Tensor], targets: Any) -> list[Tensor]:
        """Return the losses of a batch, one per task."""

    @abstractmethod
    def test(self, outputs: Outputs) -> list[float]:
        """Return the metrics of ``outputs`` on inputs that were not used in training."""


@dataclass(frozen=True)
class Problem:
    """A family of trials, one per seed."""

    name: str
    metrics: tuple[Metric, ...]
    make: Callable[[int], Trial]
    # The middle of the learning rates that are tried, as a multiple of the trial's, and those of the rotations.
    middle_lr: float = 1.0
    rotation_lrs: tuple[float, float] = (1e-3, 1e-2)
