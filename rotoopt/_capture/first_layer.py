"""The first layer of a head, which shows along which dimension the features are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rotoopt._capture.representation import RotatedDims
from rotoopt._torch.warn import warn_user

# What has the number of features, and their dimension. Maps (C, H, W) and (C, D, H, W) have no batch.
CHANNEL_LAYERS: dict[type[nn.Module], tuple[str, int]] = {
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d), ("in_channels", 1)),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), ("in_channels", -3)),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d), ("in_channels", -4)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), ("num_features", 1)),
    nn.InstanceNorm1d: ("num_features", 1),
    nn.GroupNorm: ("num_channels", 1),
}


@dataclass(frozen=True)
class FirstLayer:
    """The first layer with parameters of a head.

    Attributes:
        name: Its description.
        size: Number of its input features.
        dim: Their dimension.
        needs_z: Whether other inputs of the head may provide these.
    """

    name: str
    size: int
    dim: int
    needs_z: bool

    @classmethod
    def of(cls, head: nn.Module) -> FirstLayer | None:
        """Return the first layer of ``head``, None if its number of input features is unknown."""
        first = next((each for each in head.modules() if next(each.parameters(recurse=False), None) is not None), None)
        if isinstance(first, nn.Linear):
            return cls("Linear", first.in_features, -1, needs_z=True)
        found = next((found for kind, found in CHANNEL_LAYERS.items() if isinstance(first, kind)), None)
        return None if found is None else cls(type(first).__name__, getattr(first, found[0]), found[1], needs_z=False)

    def check(self, shape: torch.Size, dims: RotatedDims, *, alone: bool) -> None:
        """Raise if ``dim`` was not given, and the features of a representation of ``shape`` are elsewhere.

        If it was given, warn.

        Args:
            shape: The shape of the input of the head.
            dims: The rotated dimensions.
            alone: Whether no other floating-point tensor enters.
        """
        ndim = len(shape)
        if ndim < 2 or not -ndim <= self.dim < ndim or (self.needs_z and not alone):
            return
        features = self.dim % ndim
        if dims.assumed:
            features = 1 if self.needs_z else features  # of maps that are pooled in front of it
            is_sample = features == 0 and self.size == 1
            if ndim == 3 and shape[features] == self.size != shape[-1] and not is_sample:
                raise ValueError(
                    "`dim` must be given for a representation whose features are not in its last dimension, got none "
                    f"for shape {tuple(shape)} and a head that begins with {self.name}, which takes {self.size} "
                    f"features. Use dim={features} for the channels of maps {'(B, C, T)' if features else '(C, H, W)'},"
                    " and dim=-1 if this is (B, T, C). All other dimensions count as samples."
                )
        elif (
            dims.exist_in(shape)
            and features not in dims.resolve(shape)
            and shape[features] == self.size != dims.size(shape)
            and self.size > 1
        ):
            warn_user(
                f"`dim` should be the dimension of the features, got dim={dims.dim} for a representation of shape "
                f"{tuple(shape)} and a head that begins with {self.name}, which takes {self.size} features: samples or "
                f"positions are mixed. Use dim={self.dim if self.needs_z else features}."
            )
