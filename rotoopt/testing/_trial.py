"""A trial: run a model forward and backward as often as needed, and leave everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rotoopt._capture.faults import check_weighting
from rotoopt._capture.fed import Fed
from rotoopt._capture.wiring import Wiring
from rotoopt._engine.losses import Losses, check_losses
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
        self.engine = self.core.engine
        self.names = self.engine.names
        self._losses = losses

    def losses(self) -> dict[int, Tensor]:
        """Return the losses of the present tasks, by task.

        Raises:
            AssertionError: If ``optimizer.step`` would refuse them. What the model itself raises is let through.
        """
        self.engine.capture.fed = Fed()
        torch.manual_seed(0)
        losses = self._losses()
        try:
            return check_losses(losses, self.names)
        except (TypeError, ValueError) as error:
            raise AssertionError(str(error)) from None

    def fed(self) -> dict[int, bool]:
        """Return the tasks whose heads were fed in the latest forward pass, and whether z required grad."""
        return self.engine.capture.fed.tasks

    def check_wiring(self, losses: dict[int, Tensor]) -> None:
        """Raise if ``optimizer.step`` would refuse how ``losses`` were computed.

        Raises:
            AssertionError: With what it would say.
        """
        engine = self.engine
        try:
            one_tensor = Wiring(self.names, self.core.heads, engine.capture.places).check(
                losses, engine.capture.fed, None
            )
            check_weighting(engine.weighting, engine.capture.fed, self.names, one_tensor=one_tensor)
        except RuntimeError as error:
            raise AssertionError(str(error)) from None

    def backward(self, losses: dict[int, Tensor]) -> None:
        """Back-propagate ``losses`` as a step does."""
        self.optimizer.backward({self.names[task]: loss for task, loss in losses.items()})

    def step(self) -> None:
        """Make a whole step."""
        self.optimizer.step({self.names[task]: loss for task, loss in self.losses().items()})

    def true_gradients(self, params: list[Tensor]) -> dict[int, list[Tensor | None]]:
        """Return the gradient of every loss, that of the rotated model, at every one of ``params``."""
        with self.optimizer.paused():  # in the backward pass, too, where activation checkpointing runs heads again
            # Forward again for every loss: a graph that was compiled can be used once.
            return {
                task: list(torch.autograd.grad(self.losses()[task], params, allow_unused=True))
                for task in self.losses()
            }

    def parameters(self) -> list[Tensor]:
        """Return what the optimizer trains."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def divisors(self) -> list[float]:
        """Return what the losses of the latest backward pass were divided by."""
        references = self.engine.memory.loss_reference.values.tolist()
        return references if self.engine.normalize_losses else [1.0] * len(references)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo whatever happens inside, but for what a forward pass does to buffers of the model."""
        params = self.parameters()
        values = [param.detach().clone() for param in params]
        grads = [param.grad for param in params]
        state = copy.deepcopy(self.core.state_dict())  # without the user's hooks: one may be at fault
        record = self.engine.record
        for param in params:
            param.grad = None
        try:
            with torch.random.fork_rng():
                yield
        finally:
            with torch.no_grad():
                for param, value, grad in zip(params, values, grads, strict=True):
                    param.copy_(value)
                    param.grad = grad
            self.core.load_state_dict(state)
            self.engine.record = record
            self.engine.capture.fed = Fed()
