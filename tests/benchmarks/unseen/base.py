"""The base class of the unseen problems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Losses = Mapping[str, Tensor | None]
Heads = nn.ModuleDict | Mapping[str, nn.Module | tuple[nn.Module, ...]]


class Problem(ABC):
    """A new network, its data and its optimizer; everything is determined by the seed.

    Attributes:
        about: What it is, in a few words.
        metrics: Names of the errors.
        lr: Learning rate: the one of three with which the plain sum has the lowest errors.
        num_steps: Number of training steps.
        dim: Dimension of the features of the representation; None: the last one.
        one_representation: Whether the same tensor enters all heads. TorchJD's aggregators require it.
        generator: Draws the data.
        model: The whole network.
        heads: Its heads, by task.
    """

    about: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    lr: ClassVar[float]
    num_steps: ClassVar[int]
    dim: ClassVar[int | None] = None
    one_representation: ClassVar[bool] = True

    model: nn.Module
    heads: nn.ModuleDict

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)  # for the weights
        self.generator = torch.Generator().manual_seed(1000 + seed)

    @property
    def heads_by_task(self) -> Heads:
        """The heads as :class:`~rotoopt.RotoGradOptimizer` expects them."""
        return self.heads

    def optimizer(self) -> Optimizer:
        """Return the optimizer of the plain sum."""
        return torch.optim.Adam(self.model.parameters(), lr=self.lr)

    def scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """Return the scheduler of the learning rate, if there is one."""
        return None

    @abstractmethod
    def losses(self) -> Losses:
        """Draw a training batch, and return the loss of every task; None for a task without labels in this batch."""

    @abstractmethod
    def errors(self) -> dict[str, float]:
        """Return the errors on data that were not used in training. Lower is better."""

    def randn(self, *shape: int) -> Tensor:
        """Draw normally distributed numbers."""
        return torch.randn(shape, generator=self.generator)

    def rand(self, *shape: int) -> Tensor:
        """Draw uniformly distributed numbers."""
        return torch.rand(shape, generator=self.generator)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Draw integers below ``high``."""
        return torch.randint(high, shape, generator=self.generator)
