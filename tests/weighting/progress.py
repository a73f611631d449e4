"""Default weightings, and measurements to call them with."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rotoopt import ProgressWeighting
from rotoopt.weighting import Measurements
from tests.samplers import Bench

STEPS = 8
DECAY = 0.5  # of a weighting in a few steps: its reference is the mean of two losses
ALPHAS = st.sampled_from([0.0, 0.5, 0.75, 1.0, 1.5])
SHAPE = (4, 6)


def bench(K: int, dtype: torch.dtype = torch.float64, alpha: float = 0.75, **options: Any) -> Bench:
    weighting = ProgressWeighting(alpha, decay=DECAY)
    return Bench(SHAPE, K, dtype, **{"weighting": weighting, "rotate": False, "burn_in_period": 3} | options)


def measured(
    norms: Tensor, losses: Tensor | None = None, agreement: Tensor | None = None, *, burnt_in: bool = True
) -> Measurements:
    """Return the measurements of a step with all tasks."""
    everywhere, unknown = torch.ones(len(norms), dtype=torch.bool), torch.full_like(norms, torch.nan)
    return Measurements(
        norms, everywhere, torch.tensor(True), losses, None, unknown, unknown, agreement, burnt_in=burnt_in
    )


def shares(found: Bench) -> Tensor:
    """Return the share of each task in the sum of the weighted norms."""
    weighted = found.record.weights * found.record.grad_norms
    return weighted / weighted.sum()
