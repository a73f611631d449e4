"""Rotations as a parameter that the user's own optimizer steps on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rotoopt._rotation.coordinates import Coordinates
from rotoopt._rotation.step import RotationGradient
from rotoopt._torch.private import version


class RotationParameter:
    """The coordinates of the rotations, with gradients that add up in ``parameter.grad``.

    Whoever uses the rotations calls :meth:`turn` first, which applies what an optimizer has done to the parameter.

    Args:
        coordinates: The coordinates of the rotations.
    """

    def __init__(self, coordinates: Coordinates) -> None:
        self._coordinates = coordinates
        self._version = version(self.parameter)
        self._graded = False  # since the last turn

    @property
    def parameter(self) -> nn.Parameter:
        """The coordinates, zero after :meth:`turn`. Shape ``(K, m, m)``."""
        return self._coordinates.parameter

    def add(self, gradients: Sequence[RotationGradient]) -> None:
        """Add the gradient of a backward pass; there is none where one task was alone. Nothing turns yet."""
        if gradients:
            grad = self._coordinates.gradient(gradients)
            self.parameter.grad = grad if self.parameter.grad is None else self.parameter.grad + grad
            self._graded = True

    def turn(self) -> None:
        """Apply what an optimizer has done, if anything."""
        param = self.parameter
        # Some optimizers step on `param.data`, which leaves no trace in its version.
        if version(param) != self._version or (self._graded and bool(param.any())):
            self._coordinates.turn()
            self._version = version(param)
        self._graded = False
