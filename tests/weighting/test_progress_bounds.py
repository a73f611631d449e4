"""The default weighting: bounded weights, for gradients and losses of any size, and unknown ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rotoopt import ProgressWeighting
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, Sampler
from tests.weighting.progress import ALPHAS, DECAY, SHAPE, STEPS, bench, measured


@given(K=NUM_TASKS, seed=SEEDS, alpha=ALPHAS)
def test_tasks_without_a_gradient_so_far_do_not_change_the_weights_of_others(K: int, seed: int, alpha: float) -> None:
    sampler, (of_all, of_seen) = Sampler(seed), (ProgressWeighting(alpha, decay=DECAY) for _ in range(2))
    seen = sampler.uniform(K) < 0.7
    seen[sampler.integer(K)] = True
    for _ in range(STEPS):
        norms, losses, agreement = sampler.uniform(K), sampler.uniform(K), 1 + sampler.uniform(K)
        expected = of_seen(measured(norms[seen], losses[seen], agreement[seen]))
        weights = of_all(measured(norms * seen, losses, agreement.where(seen, torch.nan)))
        assert_close(weights, torch.ones_like(norms).masked_scatter(seen, expected))


@given(K=NUM_TASKS, seed=SEEDS, alpha=ALPHAS)
def test_a_zero_gradient_is_treated_like_an_absent_one(K: int, seed: int, alpha: float) -> None:
    sampler, (zero, absent) = Sampler(seed), (ProgressWeighting(alpha, decay=DECAY) for _ in range(2))
    for step in range(STEPS):
        found = measured(sampler.uniform(K), sampler.uniform(K))
        if step % 2:
            found.norms[0] = 0.0
        weights = zero(found), absent(replace(found, present=found.norms > 0))
        assert torch.equal(*weights)


@given(K=NUM_TASKS, seed=SEEDS, dtype=DTYPES, exponent=st.sampled_from([-300, -44, -30, 30, 37, 300]))
def test_weights_are_finite_whatever_the_size_of_a_gradient(
    K: int, seed: int, dtype: torch.dtype, exponent: int
) -> None:
    """Zero, subnormal or huge, for all tasks or one."""
    sampler, weighting = Sampler(seed, dtype), ProgressWeighting()
    for extreme in (sampler.uniform(K) < 0.5, torch.ones(K, dtype=torch.bool)):
        size = torch.tensor(10.0, dtype=torch.float64).pow(exponent).to(dtype)
        norms = torch.where(extreme, size.clamp(max=torch.finfo(dtype).max), 1 + sampler.uniform(K))
        for _ in range(2):
            weights = weighting(measured(norms, norms))
            assert weights.isfinite().all()
            assert (weights >= 0).all()
    assert weighting(measured(torch.zeros(K, dtype=dtype))).isfinite().all()


@given(K=NUM_TASKS, seed=SEEDS, factor=st.floats(1, 1e6))
def test_an_exploding_gradient_is_scaled_down(K: int, seed: int, factor: float) -> None:
    sampler, weighting = Sampler(seed), ProgressWeighting()
    norms = 1 + sampler.uniform(K)
    for _ in range(10):
        weights = weighting(measured(norms))
    norms[0] *= factor
    again = weighting(measured(norms))
    assert again[0] <= weights[0] * (1 + 1e-12)
    assert (again * norms)[0] <= 3 * (1 + 1e-12) * (again * norms)[1]


@pytest.mark.parametrize("K", [2, 5])
def test_a_vanishing_gradient_is_scaled_up_to_a_bound(K: int) -> None:
    weighting, norms = ProgressWeighting(), 1 + Sampler(0).uniform(K)
    largest = float(norms[0])
    for _ in range(600):
        weights = weighting(measured(norms))
        norms[0] = max(float(norms[0]) / 2, 1e-300)
    others = norms[1:].sum()
    assert weights[0] == pytest.approx(float(others / K) / (largest / 1000), rel=0.01)


@given(K=NUM_TASKS, seed=SEEDS, bad=st.sampled_from([math.inf, math.nan]))
def test_non_finite_values_are_not_stored(K: int, seed: int, bad: float) -> None:
    sampler, (one, other) = Sampler(seed), (bench(K, burn_in_period=0) for _ in range(2))
    for step in range(STEPS):
        grads, values = sampler.normal(K, *SHAPE), sampler.uniform(K).tolist()
        if step % 2:
            spoiled = grads.clone()
            spoiled[0, 0, 0] = bad
            other.step(list(spoiled), values)
        one.step(list(grads), values)
        other.step(list(grads), values)
        if step > 1:  # the weights of the first two steps are special
            assert_close(other.record.weights, one.record.weights, rtol=1e-12, atol=0)


@given(K=st.integers(2, 6), seed=SEEDS, negative=st.sampled_from(["once", "always"]))
def test_a_task_with_a_negative_loss_has_the_mean_progress_of_the_others(K: int, seed: int, negative: str) -> None:
    """The geometric mean, when the agreement was measured last: a likelihood does not get the share of a slow task."""
    sampler, norms = Sampler(seed), torch.ones(K).double()
    weighting = ProgressWeighting(1.0, decay=0.0)
    losses = 0.1 + sampler.uniform(K)
    for step, factor in enumerate((torch.ones(K).double(), 0.1 + 0.9 * sampler.uniform(K))):
        losses = losses * factor
        if step == 0 or negative == "always":
            losses[0] = -1.0
        else:
            losses[0] = 3.0
        weights = weighting(measured(norms, losses, torch.full_like(norms, torch.nan)))
    rates = factor.clone()
    rates[0] = factor[1:].log().mean().exp()
    assert_close(weights / weights.sum(), rates / rates.sum())


def test_progress_is_ignored_without_losses() -> None:
    weighting, norms = ProgressWeighting(), torch.tensor([1.0, 1.0])
    for _ in range(50):
        assert_close(weighting(measured(norms)), norms)


def test_a_task_that_was_never_seen_has_weight_one() -> None:
    found = bench(3)
    grads = [torch.ones(SHAPE).double(), 2 * torch.ones(SHAPE).double(), None]
    for _ in range(2):
        found.step(grads, [1.0, 1.0, 1.0])
    found.step([None, None, torch.ones(SHAPE).double()], [1.0, 1.0, 1.0])
    assert found.record.weights[2] == 1
