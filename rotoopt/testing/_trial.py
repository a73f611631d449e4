"""A trial: run a model forward and backward any number of times, and restore everything."""

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
    """The losses of one batch, recomputed with the same random numbers.

    Args:
        optimizer: The optimizer of the model.
        losses: Computes the losses of one batch, always the same one.
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
            AssertionError: If ``optimizer.step`` would reject them. Errors of the model itself are not caught.
        """
        self.engine.capture.fed = Fed()
        torch.manual_seed(0)
        losses = self._losses()
        try:
            return check_losses(losses, self.names)
        except (TypeError, ValueError) as error:
            raise AssertionError(str(error)) from None

    def fed(self) -> dict[int, bool]:
        """Return the tasks whose heads ran in the latest forward pass, and whether their z required grad."""
        return self.engine.capture.fed.tasks

    def check_wiring(self, losses: dict[int, Tensor]) -> None:
        """Raise if ``optimizer.step`` would reject how ``losses`` were computed.

        Raises:
            AssertionError: With the message of that error.
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
        """Run a whole step."""
        self.optimizer.step({self.names[task]: loss for task, loss in self.losses().items()})

    def true_gradients(self, params: list[Tensor]) -> dict[int, list[Tensor | None]]:
        """Return the gradients of every loss of the rotated model with respect to ``params``, without torch.compile."""
        # Paused during the backward pass, too, where activation checkpointing reruns heads.
        with self.optimizer.paused(), torch.compiler.set_stance(self._stance()):
            # One forward pass per loss: a compiled graph can be used only once.
            return {
                task: list(torch.autograd.grad(self.losses()[task], params, allow_unused=True))
                for task in self.losses()
            }

    def _stance(self) -> str:
        """Return that without torch.compile, unless the losses differ, as with dropout, which draws other numbers."""
        compiled = self.losses()
        with torch.compiler.set_stance("force_eager"):
            eager = self.losses()
        same = all(torch.allclose(loss, eager[task], rtol=1e-3, atol=0.0) for task, loss in compiled.items())
        return "force_eager" if same else "default"

    def parameters(self) -> list[Tensor]:
        """Return the parameters of the optimizer."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def divisors(self) -> list[float]:
        """Return the divisors of the losses in the latest backward pass."""
        references = self.engine.memory.loss_reference.values.tolist()
        return references if self.engine.normalize_losses else [1.0] * len(references)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo everything that happens inside, except changes of the model's buffers in forward passes."""
        params = self.parameters()
        values = [param.detach().clone() for param in params]
        grads = [param.grad for param in params]
        state = copy.deepcopy(self.core.state_dict())  # without the user's hooks, which may be the fault
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
