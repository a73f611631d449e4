"""Equal weights: the plain sum of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from rotoopt.weighting._measurements import Measurements
from rotoopt.weighting._weighting import Weighting


class EqualWeighting(Weighting):
    """Add the gradients up, as ``sum(losses).backward()`` does: rotations only."""

    lagged = True

    def __call__(self, measured: Measurements) -> Tensor:
        """Return ones."""
        return torch.ones_like(measured.norms)
