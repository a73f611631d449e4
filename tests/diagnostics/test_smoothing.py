"""Series are drawn with few points, without hiding anything."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rotoopt.diagnostics._smoothing import (
    MIN_SMOOTHED,
    NUM_BINS,
    NUM_POINTS,
    WINDOWS_PER_SERIES,
    bin_means,
    outline,
    running_median,
)
from tests.contract.models import assert_same
from tests.samplers import SEEDS

LENGTHS = st.integers(1, 5000)


@given(length=LENGTHS, seed=SEEDS)
def test_running_median_equals_that_of_the_windows(length: int, seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(length, 2)
    values[torch.rand(length, 2) < 0.3] = torch.nan
    places, medians = running_median(values)
    assert len(places) == min(length, NUM_POINTS)
    assert places[[0, -1]].tolist() == [0, length - 1]
    half = length // (2 * WINDOWS_PER_SERIES)
    for row in range(0, len(places), 50):
        place = int(places[row])
        assert_same(medians[row], values[max(0, place - half) : place + half + 1].nanmedian(dim=0).values)
    if length < MIN_SMOOTHED:
        assert_same(medians, values)


@given(length=LENGTHS, seed=SEEDS)
def test_outline_has_every_peak(length: int, seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(length)
    places, kept = outline(values)
    assert len(places) <= 2 * NUM_BINS
    assert (places.diff() >= 0).all()
    assert_same(kept, values[places])
    for part, inside in zip(values.tensor_split(NUM_BINS), torch.arange(length).tensor_split(NUM_BINS), strict=True):
        of_bin = kept[(places >= inside.min()) & (places <= inside.max())] if len(part) else part
        if len(part):
            assert (of_bin.min(), of_bin.max()) == (part.min(), part.max())


@given(length=LENGTHS, num_bins=st.integers(1, 50), seed=SEEDS)
def test_bins_cover_all_values(length: int, num_bins: int, seed: int) -> None:
    torch.manual_seed(seed)
    num_bins = min(num_bins, length)
    values = torch.randn(length, 2, dtype=torch.float64)
    sizes = [len(part) for part in values.tensor_split(num_bins)]
    total = (bin_means(values, num_bins) * torch.tensor(sizes)[:, None]).sum(dim=0)
    torch.testing.assert_close(total, values.sum(dim=0))
    values[: sizes[0], 0] = torch.nan
    assert bin_means(values, num_bins)[0, 0].isnan()
