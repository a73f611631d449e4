"""A model that branches: its sizes, layers, heads and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt.testing._sampler import Sampler

Head = nn.Module | tuple[nn.Module, ...]
INPUTS = 5


@dataclass
class Branching:
    """A model whose heads need not all read one tensor.

    Attributes:
        shared: The modules that several tasks use.
        heads: The `heads` argument of ``RotoGradOptimizer``.
        losses: Computes the losses by task, given inputs ``(B, 5)``.
        options: Other arguments of ``RotoGradOptimizer``.
    """

    shared: Sequence[nn.Module]
    heads: Mapping[str, Head]
    losses: Callable[[Tensor], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)

    def modules(self) -> nn.ModuleList:
        """Return everything that has parameters."""
        return nn.ModuleList([*self.shared, *(module for name in self.heads for module in self.modules_of(name))])

    def modules_of(self, task: str) -> tuple[nn.Module, ...]:
        """Return the modules of a task."""
        head = self.heads[task]
        return head if isinstance(head, tuple) else (head,)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    Attributes:
        features: d, even.
        length: Number of tokens.
        side: Side of a map, a multiple of four.
    """

    features: int = 8
    length: int = 4
    side: int = 4

    def vectors(self) -> nn.Module:
        """Return a backbone of vectors ``(B, d)``."""
        return nn.Sequential(nn.Linear(INPUTS, self.features), nn.Tanh(), nn.Linear(self.features, self.features))

    def sequences(self) -> nn.Module:
        """Return a backbone of token sequences ``(B, T, d)``."""
        d, T = self.features, self.length
        return nn.Sequential(nn.Linear(INPUTS, T * d), nn.Tanh(), nn.Unflatten(1, (T, d)), nn.Linear(d, d))

    def maps(self, channels: int | None = None) -> nn.Module:
        """Return a backbone of maps ``(B, channels, S, S)``."""
        shape = (self.features, self.side, self.side)
        first = nn.Linear(INPUTS, self.features * self.side**2)
        return nn.Sequential(first, nn.Tanh(), nn.Unflatten(1, shape), conv(self.features, channels or self.features))

    def head(self, inputs: int | None = None, outputs: int = 2) -> nn.Module:
        """Return a head of vectors or tokens."""
        return nn.Sequential(nn.Linear(inputs or self.features, 6), nn.Tanh(), nn.Linear(6, outputs))


class Call(nn.Module):
    """Named layers, and a function that is called with the layers and the inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the function."""
        return self._forward(self.layers, *args, **kwargs)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """Return a convolution that keeps the size of a map if ``stride`` is one."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


def square(output: Tensor) -> Tensor:
    """Return a squared error."""
    return (output - 1.0).square().mean()


def built(make: Callable[[Sizes], Branching], sizes: Sizes, seed: int, dtype: torch.dtype) -> Branching:
    """Return the model with weights from ``seed``; torch's global state does not change."""
    default = torch.get_default_dtype()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            return make(sizes)
        finally:
            torch.set_default_dtype(default)


def inputs(seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """Draw the inputs of one batch. Shape ``(size, 5)``."""
    return Sampler(seed, dtype).normal(size, INPUTS)
