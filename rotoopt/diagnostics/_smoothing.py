"""Smoothing: reduces long, noisy series to as many points as a plot can show."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_POINTS = 400  # of a smooth line, about two pixels each
NUM_BINS = 800  # of raw values, about one pixel each
WINDOWS_PER_SERIES = 25
MIN_SMOOTHED = 2 * WINDOWS_PER_SERIES  # values: shorter series are not smoothed


def running_median(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return medians over windows of 1/25 of the series, at up to 400 positions.

    Args:
        values: Shape ``(T, n)``; NaN is ignored.

    Returns:
        The places, as positions in the series, shape ``(P,)``, and the medians, ``(P, n)``, NaN for an empty window.
    """
    length = len(values)
    half = length // (2 * WINDOWS_PER_SERIES)
    centers = torch.linspace(0, length - 1, min(length, NUM_POINTS)).round().long()
    medians = [values[max(0, center - half) : center + half + 1].nanmedian(dim=0).values for center in centers.tolist()]
    return centers, torch.stack(medians)


def outline(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a line that looks like the line through all values: minimum and maximum of each bin, alternating.

    Args:
        values: Shape ``(T,)``, without NaN.

    Returns:
        Positions in the series, and values there, shape ``(P,)`` with P at most 1600.
    """
    positions = torch.arange(len(values))
    if len(values) <= 2 * NUM_BINS:
        return positions, values
    bins = zip(positions.tensor_split(NUM_BINS), values.tensor_split(NUM_BINS), strict=True)
    kept = torch.stack([inside[extreme] for inside, part in bins for extreme in (part.argmin(), part.argmax())])
    kept = kept.sort().values
    return kept, values[kept]


def bin_means(values: Tensor, num_bins: int) -> Tensor:
    """Return the mean of every bin, NaN where it is empty. ``(T, n)`` to ``(num_bins, n)``."""
    return torch.stack([part.nanmean(dim=0) for part in values.tensor_split(num_bins)])
