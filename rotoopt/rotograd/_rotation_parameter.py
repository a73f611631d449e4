"""Rotations as a parameter that the user's own optimizer updates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rotoopt._rotation.coordinates import Coordinates
from rotoopt._rotation.step import RotationGradient
from rotoopt._torch.private import version


class RotationParameter:
    """The coordinates of the rotations, with gradients that accumulate in ``parameter.grad``.

    :meth:`turn` must be called before the rotations are used: it applies the update that an optimizer made.

    Args:
        coordinates: The coordinates of the rotations.
    """

    def __init__(self, coordinates: Coordinates) -> None:
        self._coordinates = coordinates
        self._version = version(self.parameter)
        self._graded = False  # whether there was a gradient since the latest turn

    @property
    def parameter(self) -> nn.Parameter:
        """The coordinates, zero after :meth:`turn`. Shape ``(K, m, m)``."""
        return self._coordinates.parameter

    def add(self, gradients: Sequence[RotationGradient], _: Tensor | None = None) -> None:
        """Accumulate the gradient of a backward pass; there is none for a single task. No rotation changes yet."""
        if gradients:
            grad = self._coordinates.gradient(gradients)
            self.parameter.grad = grad if self.parameter.grad is None else self.parameter.grad + grad
            self._graded = True

    def turn(self) -> None:
        """Apply the update of an optimizer, if there was one."""
        param = self.parameter
        # Some optimizers update `param.data`, which does not change the version counter.
        if version(param) != self._version or (self._graded and bool(param.any())):
            self._coordinates.turn()
            self._version = version(param)
        self._graded = False
