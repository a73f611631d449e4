"""What every weighting has: the base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rotoopt.weighting._gradients import TaskGradients
from rotoopt.weighting._measurements import Measurements


class Weighting(ABC):
    """One weight per task, from what was measured. Subclass it for your own, with :meth:`__call__` alone.

    By default, the weights of a backward pass are made in it: K gradients wait at the representation until all have
    arrived, their norms are measured, and their weighted sum goes on to the backbone.

    Attributes:
        lagged: Whether the weights are used from the next step on instead, and so are known before its backward pass.
            Then each gradient goes on at once, times its weight, and none is kept. The weights of the first step are
            ones.
        needs_losses: Whether the losses must be seen. Then ``sum(losses).backward()`` is an error that asks for
            ``optimizer.step(losses)`` or ``optimizer.backward(losses)``.
        needs_cosines: Whether the K gradients must meet in every step, for their cosines.
        state: What the weighting remembers from step to step: tensors by name, saved and loaded with the optimizer, and
            moved with the representation. Empty at first.
    """

    lagged: bool = False
    needs_losses: bool = False
    needs_cosines: bool = False
    _bound: bool = False

    @abstractmethod
    def __call__(self, measured: Measurements) -> Tensor:
        """Return the weights of the tasks, those of absent tasks too, which nobody uses. Shape ``(K,)``.

        Called without gradients and outside of autocast: once per backward pass or, if ``lagged``, once per step with
        what all its backward passes measured together, but for those in which something was not finite.

        Args:
            measured: The measurements, float32 (float64 for float64 representations), on the device of the
                representation.
        """

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """What is remembered."""
        return {}

    def bind(self, num_tasks: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make the state for ``num_tasks`` tasks; called once, by the optimizer that uses this weighting.

        Raises:
            ValueError: If another optimizer uses it already.
        """
        if self._bound:
            raise ValueError(
                f"`weighting` must not be shared between optimizers, got a {type(self).__name__} that another one "
                f"uses. Make a new {type(self).__name__} for this one."
            )
        self._bound = True

    def combine(self, gradients: TaskGradients, weights: Tensor) -> Tensor:
        r"""Return :math:`\sum_k w_k G_k` with ``weights`` w, finite. Shape ``(n,)``."""
        return gradients.combine(weights)

    def to(self, device: torch.device) -> None:
        """Move the state to ``device``."""
        for name, tensor in self.state.items():
            self.state[name] = tensor.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return what must be saved to resume."""
        return {name: tensor.clone() for name, tensor in self.state.items()}

    def load_state_dict(self, state_dict: dict[str, Any], like: Tensor) -> None:
        """Load what :meth:`state_dict` returned, onto the device of ``like``."""
        self.state.clear()
        self.state.update({name: tensor.to(like.device, copy=True) for name, tensor in state_dict.items()})

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
