"""The default weighting: equal mean norms times progress, bounded, and independent of the scale of a loss."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rotoopt import ProgressWeighting
from tests.asserts import eps
from tests.contract.models import train, wrap
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, Sampler
from tests.weighting.progress import ALPHAS, DECAY, SHAPE, STEPS, bench, measured, shares


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
