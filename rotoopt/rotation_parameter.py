"""Rotations as a parameter that the user's own optimizer steps on: what the module API trains them through."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt.distributed import Processes
from rotoopt.lie_algebra import Coordinates
from rotoopt.rotations import Rotations


class RotationParameter:
    """A rotation step that leaves the stepping to the user: gradients go to ``parameter.grad`` and add up there.

    Whoever uses the rotations calls :meth:`turn` first, which applies what an optimizer has done to the parameter.

    Args:
        rotations: The rotations to turn.
        processes: Those that share a batch.
    """

    def __init__(self, rotations: Rotations, processes: Processes) -> None:
        self.rotations = rotations
        self._processes = processes
        self._coordinates = Coordinates(rotations)
        self._version = self.parameter._version
        self._graded = False  # since the last turn

    @property
    def parameter(self) -> nn.Parameter:
        """The coordinates, zero after :meth:`turn`. Shape ``(K, m, m)``."""
        return self._coordinates.parameter

    def turn(self) -> None:
        """Apply what an optimizer has done, if anything."""
        param = self.parameter
        # Some optimizers step on `param.data`, which leaves no trace in its version.
        if param._version != self._version or (self._graded and bool(param.any())):
            self._coordinates.turn()
            self._version = param._version
        self._graded = False

    @property
    def lr(self) -> float:
        """Not known here."""
        return math.nan

    def is_due(self, num_steps: int) -> bool:
        """Always: the schedule is the user's."""
        return True

    def collect(self, directions: Tensor, target: Tensor, usable: Tensor) -> None:
        """Add the gradient of one backward pass."""
        grad = self._coordinates.gradient(directions, target, usable)
        if self._processes.count > 1:
            self._processes.sum_(grad)
        self.parameter.grad = grad if self.parameter.grad is None else self.parameter.grad + grad
        self._graded = True

    def step(self) -> Tensor:
        """Do nothing: the user steps."""
        return torch.zeros_like(self.rotations.rotates, dtype=self.rotations.dtype)

    def clear(self) -> None:
        """Do nothing: the user clears gradients."""

    def to(self, device: torch.device) -> None:
        """Do nothing: the model has the parameter."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the model and its optimizers have the state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""
