"""Pooling: from the output of a backbone to the vectors that its heads read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class GlobalAveragePool(nn.Module):
    """Averages maps ``(b, c, h, w)`` over their positions, and returns vectors ``(b, c)`` as they are."""

    def forward(self, features: Tensor) -> Tensor:
        """Return vectors ``(b, c)``."""
        if features.ndim not in (2, 4):
            raise ValueError(
                f"`backbone` must return vectors (b, c) or maps (b, c, h, w), got shape {tuple(features.shape)}. Pass "
                "a `pool_layer` that returns vectors, or nn.Identity() if the heads accept this shape."
            )
        return features if features.ndim == 2 else features.mean(dim=(2, 3))


def features_of(backbone: nn.Module) -> int:
    """Return ``backbone.out_features``, the number of features after pooling."""
    size: Any = getattr(backbone, "out_features", None)
    if not isinstance(size, int):
        raise ValueError(
            f"`backbone` must have the number of features after pooling as an attribute, got out_features={size!r}. "
            "Set it, as in backbone.out_features = 512."
        )
    return size
