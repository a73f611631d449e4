"""The first layer of a head, which shows along which dimension of ``(B, C, T)`` the features are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rotoopt._capture.representation import RotatedDims
from rotoopt._torch.warn import warn_user

CHANNEL_LAYERS = {
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d), "in_channels"),
    **dict.fromkeys((nn.BatchNorm1d, nn.InstanceNorm1d, nn.SyncBatchNorm), "num_features"),
    nn.GroupNorm: "num_channels",
}


@dataclass(frozen=True)
class FirstLayer:
    """The first layer with parameters of a head.

    Attributes:
        name: Its description.
        size: Number of its input features.
        needs_z: Whether other inputs of the head may provide these.
    """

    name: str
    size: int
    needs_z: bool

    @classmethod
    def of(cls, head: nn.Module) -> FirstLayer | None:
        """Return the first layer of ``head``, None if its number of input features is unknown."""
        first = next((each for each in head.modules() if next(each.parameters(recurse=False), None) is not None), None)
        if isinstance(first, nn.Linear):
            return cls("Linear", first.in_features, needs_z=True)
        name = next((name for kind, name in CHANNEL_LAYERS.items() if isinstance(first, kind)), None)
        return None if name is None else cls(type(first).__name__, getattr(first, name), needs_z=False)

    def check(self, shape: torch.Size, dims: RotatedDims, *, alone: bool) -> None:
        """Raise if ``dim`` was not given, and the features of a representation of ``shape`` are elsewhere.

        If it was given, warn.

        Args:
            shape: The shape of the input of the head.
            dims: The rotated dimensions.
            alone: Whether no other floating-point tensor enters.
        """
        tells = dims.assumed and len(shape) == 3 and (alone or not self.needs_z)
        if tells and shape[1] == self.size != shape[2]:
            raise ValueError(
                "`dim` must be given for a representation whose features are not in its last dimension, got none for "
                f"shape {tuple(shape)} and a head that begins with {self.name}, which takes {self.size} features. Use "
                "dim=1 for the channels of maps (B, C, T), and dim=-1 if this is (B, T, C). All other dimensions "
                "count as samples."
            )
        if dims.assumed or not dims.exist_in(shape) or not 1 < len(shape) <= 3 or (self.needs_z and not alone):
            return
        features = -1 if self.needs_z else 1
        is_elsewhere = features % len(shape) not in dims.resolve(shape) and dims.size(shape) != self.size
        if is_elsewhere and shape[features] == self.size:
            warn_user(
                f"`dim` should be the dimension of the features, got dim={dims.dim} for a representation of shape "
                f"{tuple(shape)} and a head that begins with {self.name}, which takes {self.size} features: samples or "
                f"positions are mixed. Use dim={features}."
            )
