"""A trial: run a model forward and backward as often as needed, and leave everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rotoopt.arguments import Losses, check_losses
from rotoopt.optimizer import RotoGradOptimizer

LossFn = Callable[[], Losses]


class Trial:
    """The losses of one batch, computed again and again with the same random numbers.

    Args:
        optimizer: The optimizer of the model.
        losses: Computes the losses of one batch, always the same.
    """

    def __init__(self, optimizer: RotoGradOptimizer, losses: LossFn) -> None:
        self.optimizer = optimizer
        self.core = optimizer._core
        self.names = self.core.names
        self._losses = losses

    def losses(self) -> dict[int, Tensor]:
        """Return the losses of the present tasks, by task."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return check_losses(self._losses(), self.names)

    def true_losses(self) -> dict[int, Tensor]:
        """Return them with graphs whose gradients are those of the rotated model."""
        with self.optimizer.paused():
            return self.losses()

    def parameters(self) -> list[Tensor]:
        """Return what the optimizer trains."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def head_parameters(self) -> list[list[Tensor]]:
        """Return the parameters of every head; of none, if heads are functional."""
        return [list(head.parameters()) for head in self.core.heads]

    def divisors(self) -> list[float]:
        """Return what the losses of the latest backward pass were divided by."""
        references = self.core.homogenizer.loss_reference.values.tolist()
        return references if self.core.back_propagate.normalize_losses else [1.0] * len(references)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo whatever happens inside, but for what a forward pass does to buffers of the model."""
        params = self.parameters()
        values = [param.detach().clone() for param in params]
        grads = [param.grad for param in params]
        state = copy.deepcopy(self.optimizer.state_dict())
        record = self.core.homogenizer.record
        for param in params:
            param.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for param, value, grad in zip(params, values, grads, strict=True):
                    param.copy_(value)
                    param.grad = grad
            self.optimizer.load_state_dict(state)
            self.core.homogenizer.record = record
            self.core.capture.start_over()
