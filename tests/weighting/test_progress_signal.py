"""The default weighting: the share of a gradient that is signal, and how progress depends on it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt import ProgressWeighting
from tests.samplers import NUM_TASKS, SEEDS, Sampler
from tests.weighting.progress import ALPHAS, measured


@given(K=NUM_TASKS, seed=SEEDS, alpha=ALPHAS)
def test_shares_are_proportional_to_the_signal(K: int, seed: int, alpha: float) -> None:
    """One minus the part that is noise, of a mean over thirty turns; below a tenth it is not significant.

    One measurement counts as much as that all tasks have the same signal.
    """
    sampler, weighting, mean = Sampler(seed), ProgressWeighting(alpha), torch.zeros(K).double()
    norms = 1 + sampler.uniform(K)
    for turn in range(33):
        latest = 2 * sampler.uniform(K) + sampler.log_scales(K, -1, 2)
        mean += (latest - mean) / min(turn + 1, 30)
        weights = weighting(measured(norms, agreement=latest))
        assert_close(weighting(measured(norms)), weights)  # a step in which it is not measured changes nothing
        logs = (1 - 1 / mean).clamp(0.1, 1.0).log()
        expected = (alpha * torch.lerp(logs.mean(), logs, (turn + 1) / (turn + 2))).exp()
        weighted = weights * norms
        assert_close(weighted / weighted.sum(), expected / expected.sum())


@given(K=st.integers(2, 6), seed=SEEDS, data=st.data())
def test_a_task_whose_signal_is_unknown_has_the_mean_of_the_others(K: int, seed: int, data: st.DataObject) -> None:
    """The geometric mean, with which the ratios of the other shares do not change."""
    sampler, unknown = Sampler(seed), torch.tensor(data.draw(st.lists(st.booleans(), min_size=K, max_size=K)))
    norms, found = torch.ones(K).double(), 2 + sampler.uniform(K)
    weights = ProgressWeighting(1.0)(measured(norms, agreement=found.masked_fill(unknown, torch.nan)))
    logs = (1 - 1 / found).log()
    mean = logs[~unknown].mean() if not unknown.all() else torch.tensor(0.0).double()
    expected = torch.where(unknown, mean, (logs + mean) / 2).exp()
    assert_close(weights / weights.sum(), expected / expected.sum())


def with_progress(rates: Tensor, agreement: Tensor, alpha: float, turns: int) -> Tensor:
    """Return the shares of tasks with these remaining losses, after so many measurements of the agreement."""
    weighting, norms = ProgressWeighting(alpha, decay=0.0), torch.ones_like(rates)
    weighting(measured(norms, norms))
    for _ in range(turns):
        weights = weighting(measured(norms, rates, agreement))
    return weights / weights.sum()


@given(K=NUM_TASKS, seed=SEEDS, alpha=ALPHAS)
def test_progress_counts_as_far_as_the_gradient_is_signal(K: int, seed: int, alpha: float) -> None:
    """Otherwise the mean of the others' counts, weighted by their signals."""
    sampler = Sampler(seed)
    rates, agreement = 1e-3 + 0.9 * sampler.uniform(K), sampler.log_scales(K, -0.3, 2)
    signal = (1 - 1 / agreement).clamp(min=0.1)
    turns = 1 + sampler.integer(4)
    signal = torch.lerp(signal.log().mean(), signal.log(), turns / (turns + 1)).exp()
    mean = ((signal * rates.log()).sum() / signal.sum()).exp()
    expected = (signal * rates**signal * mean ** (1 - signal)) ** alpha
    assert_close(with_progress(rates, agreement, alpha, turns), expected / expected.sum())


@given(K=NUM_TASKS, seed=SEEDS)
def test_rotations_follow_the_root_of_the_remaining_loss(K: int, seed: int) -> None:
    """One where it is unknown: no loss so far, a negative one, no measurement of the agreement."""
    sampler, weighting, norms = Sampler(seed), ProgressWeighting(decay=0.0), torch.ones(K).double()
    first, later, signs = sampler.log_scales(K, -3, 3), sampler.log_scales(K, -6, 1), sampler.normal(K).sign()
    weighting(measured(norms, first))
    assert weighting.remaining is None
    weighting(measured(norms, first * later * signs, norms + 1))
    expected = torch.where(signs > 0, later.clamp(1e-4, 1.0).sqrt(), 1.0)
    assert_close(weighting.remaining, expected)


@given(K=st.integers(2, 6), seed=SEEDS)
def test_a_loss_that_cannot_decrease_gets_a_larger_share_only_with_a_signal(K: int, seed: int) -> None:
    """The first task does not progress, all others do, with much signal."""
    sampler, first = Sampler(seed), torch.arange(K) == 0
    rates, agreement = (0.01 + 0.2 * sampler.uniform(K)).masked_fill(first, 1.0), 10 + 90 * sampler.uniform(K)
    with_signal, with_noise = (
        with_progress(rates, agreement.masked_fill(first, found), 0.5, turns=10)[0] for found in (100.0, 1.0)
    )
    assert with_signal > 1.3 / K
    assert with_noise < 1 / K


@given(K=st.integers(2, 6), seed=SEEDS)
def test_the_only_known_signal_is_that_of_all(K: int, seed: int) -> None:
    agreement = (1 + Sampler(seed).uniform(K)).masked_fill(torch.arange(K) > 0, torch.nan)
    weights = ProgressWeighting(1.0)(measured(torch.ones(K).double(), agreement=agreement))
    assert_close(weights, torch.ones(K).double())


@given(K=st.integers(2, 6), seed=SEEDS, late=st.integers(1, 3))
def test_a_signal_counts_from_its_first_measurement_on(K: int, seed: int, late: int) -> None:
    weighting, norms, first = ProgressWeighting(1.0), torch.ones(K).double(), torch.arange(K) == 0
    for _ in range(late):
        weighting(measured(norms, agreement=torch.full_like(norms, 2.0).masked_fill(first, torch.nan)))
    agreement = 2 + Sampler(seed).uniform(K)
    weights = weighting(measured(norms, agreement=agreement))
    means = torch.where(first, agreement, (2 * late + agreement) / (late + 1))
    logs, trust = (1 - 1 / means).log(), torch.where(first, 1 / 2, (late + 1) / (late + 2)).double()
    expected = torch.lerp(logs.mean(), logs, trust).exp()
    assert_close(weights / weights.sum(), expected / expected.sum())
