"""Pooling: from what a backbone returns to the vectors that its heads consume."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class GlobalAveragePool(nn.Module):
    """Averages maps ``(b, c, h, w)`` over their positions, and passes vectors ``(b, c)``."""

    def forward(self, features: Tensor) -> Tensor:
        """Return vectors ``(b, c)``."""
        if features.ndim not in (2, 4):
            raise ValueError(
                f"`backbone` must return vectors (b, c) or maps (b, c, h, w), got shape {tuple(features.shape)}. Give "
                "a `pool_layer` that makes vectors of them, or nn.Identity() if the heads take them as they are."
            )
        return features if features.ndim == 2 else features.mean(dim=(2, 3))


def features_of(backbone: nn.Module) -> int:
    """Return ``backbone.out_features``, the number of features after pooling."""
    size: Any = getattr(backbone, "out_features", None)
    if not isinstance(size, int):
        raise ValueError(
            f"`backbone` must say how many features it has after pooling, got out_features={size!r}. Set it, as in "
            "backbone.out_features = 512."
        )
    return size
