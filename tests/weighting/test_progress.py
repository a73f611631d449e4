"""The default weighting: equal mean norms times progress, bounded, and independent of the scale of a loss."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt import ProgressWeighting
from rotoopt.weighting import Measurements
from tests.asserts import eps
from tests.contract.models import train, wrap
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, Bench, Sampler

STEPS = 8
DECAY = 0.5  # of a weighting in a few steps: its reference is the mean of two losses
ALPHAS = st.sampled_from([0.0, 0.5, 1.0, 1.5])
SHAPE = (4, 6)


def bench(K: int, dtype: torch.dtype = torch.float64, alpha: float = 0.5, **options: Any) -> Bench:
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


@given(K=NUM_TASKS, seed=SEEDS, power=st.integers(-30, 30), alpha=ALPHAS, dtype=DTYPES)
def test_scale_of_a_loss_does_not_change_the_shares(
    K: int, seed: int, power: int, alpha: float, dtype: torch.dtype
) -> None:
    """At any time: in the first step, before the end of the burn-in and after it."""
    sampler, scaled = Sampler(seed, dtype), Sampler(seed).integer(K)
    one, other = (bench(K, dtype, alpha) for _ in range(2))
    for _ in range(STEPS):
        grads, values = sampler.normal(K, *SHAPE), sampler.uniform(K)
        one.step(list(grads), values.tolist())
        grads[scaled], values[scaled] = grads[scaled] * 2.0**power, values[scaled] * 2.0**power
        other.step(list(grads), values.tolist())
        assert_close(shares(other), shares(one), rtol=50 * eps(dtype), atol=0)


@given(K=NUM_TASKS, seed=SEEDS, power=st.integers(-30, 30), alpha=ALPHAS, dtype=DTYPES)
def test_scale_of_all_gradients_does_not_change_the_weights(
    K: int, seed: int, power: int, alpha: float, dtype: torch.dtype
) -> None:
    sampler, (one, other) = Sampler(seed, dtype), (bench(K, dtype, alpha) for _ in range(2))
    for _ in range(STEPS):
        grads, values = sampler.normal(K, *SHAPE), sampler.uniform(K).tolist()
        one.step(list(grads), values)
        other.step(list(grads * 2.0**power), [value * 2.0**power for value in values])
        assert torch.equal(other.record.weights, one.record.weights)


@given(K=NUM_TASKS, seed=SEEDS, alpha=ALPHAS)
def test_sum_of_weighted_norms_equals_that_of_the_plain_sum(K: int, seed: int, alpha: float) -> None:
    sampler, weighting = Sampler(seed), ProgressWeighting(alpha, decay=DECAY)
    norms = sampler.log_scales(K, -3, 3)
    for _ in range(STEPS):  # constant, so that averages are known
        weights = weighting(measured(norms, sampler.uniform(K) + 0.1))
        assert_close((weights * norms).sum(), norms.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("K", [2, 5])
def test_norms_are_equal_on_average(K: int) -> None:
    """For gradients whose norms fluctuate around a different mean for each task."""
    sampler, weighting = Sampler(0), ProgressWeighting(decay=0.999)
    means, total = sampler.log_scales(K, -3, 3), torch.zeros(K).double()
    for step in range(1200):
        norms = means * (0.5 + sampler.uniform(K))
        weights = weighting(measured(norms))
        total += weights * norms / means.mean() if step >= 200 else 0
    # The mean of 1000 norms has a standard error of 0.9 %.
    assert_close(total, total.mean().expand(K), rtol=0.03, atol=0)


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("converges", [True, False], ids=["it converges", "all others converge"])
def test_share_of_a_converging_task_decreases_and_of_others_increases(K: int, converges: bool) -> None:
    weighting, norms = ProgressWeighting(), 1 + Sampler(0).uniform(K)
    shares = []
    for step in range(150):
        losses = torch.full((K,), 1.0 if converges else 0.9**step).double()
        losses[0] = 0.9**step if converges else 1.0
        weighted = weighting(measured(norms, losses)) * norms
        shares.append(float(weighted[0] / weighted.sum()))
    assert shares[:20] == pytest.approx([1 / K] * 20)
    assert shares[19:] == sorted(shares[19:], reverse=converges)
    assert shares[-1] < 0.25 / K if converges else shares[-1] > 1.5 / K


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


def test_weight_of_a_quadratic_loss_does_not_grow_while_it_converges() -> None:
    """A weight computed from norms alone grows without bound, and so does the curvature of the weighted loss."""
    weights = {}
    for alpha in (0.0, 0.5):
        weighting = ProgressWeighting(alpha, decay=0.0)
        for distance in (1.0, 0.3, 0.1, 0.03):
            norms, losses = torch.tensor([2 * distance, 1.0]), torch.tensor([distance**2, 1.0])
            found = weighting(measured(norms, losses))
        weights[alpha] = float(found[0] / found[1])
    assert weights[0.5] == pytest.approx(0.5)
    assert weights[0.0] == pytest.approx(0.5 / 0.03)


@given(K=NUM_TASKS, seed=SEEDS, data=st.data())
def test_order_of_the_tasks_does_not_matter(K: int, seed: int, data: st.DataObject) -> None:
    sampler, order = Sampler(seed), data.draw(st.permutations(range(K)))
    one, other = bench(K), bench(K)
    for _ in range(STEPS):
        grads, values = sampler.normal(K, *SHAPE), sampler.uniform(K)
        one.step(list(grads), values.tolist())
        other.step([grads[k] for k in order], values[order].tolist())
        assert_close(other.record.weights, one.record.weights[order], rtol=1e-12, atol=0)


@given(K=NUM_TASKS, seed=SEEDS)
def test_a_batch_per_task_is_weighted_like_a_joint_batch(K: int, seed: int) -> None:
    """After every task has been present once: the first gradient of a task has weight one."""
    sampler, (together, apart) = Sampler(seed), (bench(K) for _ in range(2))
    grads = sampler.normal(K, *SHAPE) * sampler.log_scales(K, -2, 2)[:, None, None]
    values = sampler.uniform(K).tolist()
    for _ in range(5):
        together.step(list(grads), values)
        latest = torch.ones(K, dtype=torch.float64)
        for task in range(K):
            apart.step([grad if k == task else None for k, grad in enumerate(grads)], values)
            latest[task] = apart.record.weights[task]
    assert_close(latest, together.record.weights, rtol=1e-10, atol=0)


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


@given(K=NUM_TASKS, seed=SEEDS, dtype=DTYPES, decay=st.sampled_from([0.0, 0.5, 0.9, 0.95]))
def test_losses_count_relative_to_their_first_mean_after_the_burn_in(
    K: int, seed: int, dtype: torch.dtype, decay: float
) -> None:
    """The first running mean, over as many losses as a running mean covers; at most one; a loss of zero is progress."""
    sampler, weighting, norms = Sampler(seed, dtype), ProgressWeighting(1.0, decay=decay), torch.ones(K, dtype=dtype)
    length = round(1 / (1 - decay))
    for _ in range(sampler.integer(5)):
        weights = weighting(measured(norms, 100 * sampler.uniform(K), burnt_in=False))
        assert_close(weights, norms)
    losses = []
    for step in range(2 * length + 2):
        losses.append(2 * sampler.uniform(K) * (sampler.uniform(K) > 0.2))
        weights = weighting(measured(norms, losses[-1]))
        if step < length:
            assert_close(weights, norms)
    first = torch.stack(losses[:length]).mean(0)
    mean = first
    for each in losses[length:]:
        mean = mean + (each - mean) * (1 - decay)
    known = first > 0  # all were zero: no ratio
    rates = torch.where(known | (mean > 0), (mean / first).clamp(1e-4, 1.0), 1.0)
    assert_close(weights / weights.sum(), rates / rates.sum(), rtol=1e-4, atol=0)


def test_a_small_first_batch_does_not_decide() -> None:
    """Losses of two equal tasks that scatter by a factor of two: no task is favored permanently."""
    sampler, weighting, norms = Sampler(0), ProgressWeighting(), torch.ones(2).double()
    shares = []
    for _ in range(400):
        weights = weighting(measured(norms, sampler.log_scales(2, -0.3, 0.3)))
        shares.append(float(weights[0] / weights.sum()))
    # The standard error of a mean of 20 such logarithms is 0.09 for each task.
    assert abs(sum(shares[40:]) / len(shares[40:]) - 0.5) < 0.05


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


def test_a_loss_that_starts_at_its_minimum_gets_no_huge_weight() -> None:
    """As in distillation: the first gradient is a rounding error, the second one is millions of times larger."""
    found = bench(2)
    for size in (1e-9, 1e-2, 2e-2, 3e-2):
        found.step([torch.ones(SHAPE).double(), size * torch.ones(SHAPE).double()], [1.0, size**2])
        assert shares(found)[1] < 0.8


def test_weights_are_computed_from_earlier_steps_except_the_first() -> None:
    model, optimizer = wrap()
    lagged = []
    for step in range(3):
        train(model, optimizer, step)
        assert optimizer.last_step is not None
        lagged.append(optimizer.last_step.lagged)
    assert lagged == [False, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.5}, "`alpha` must be a non-negative number, got -0.5."),
        ({"alpha": math.nan}, "`alpha` must be a non-negative number, got nan."),
        ({"decay": 1.0}, "`decay` must be at least 0 and below 1, got 1.0."),
        ({"decay": -0.1}, "`decay` must be at least 0 and below 1, got -0.1."),
    ],
)
def test_wrong_argument(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ProgressWeighting(**options)


def test_repr_shows_its_arguments() -> None:
    assert repr(ProgressWeighting(1.0)) == "ProgressWeighting(alpha=1.0)"


@pytest.mark.parametrize("agrees", [False, True])
def test_the_state_has_the_dtype_of_the_latest_gradients(agrees: bool) -> None:
    """These differ between steps if the heads of some tasks are in float64."""
    weighting = ProgressWeighting()
    weighting.bind(2, torch.device("cpu"), torch.float32)
    for dtype in (torch.float32, torch.float64, torch.float32, torch.float64):
        ones = torch.ones(2, dtype=dtype)
        for agreement in (None, ones if agrees else None):
            assert weighting(measured(ones, ones, agreement)).dtype == dtype
    assert {tensor.dtype for tensor in weighting.state.values()} == {torch.float64}
