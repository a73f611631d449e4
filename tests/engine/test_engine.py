"""Homogenization: the records, and that no gradient corrupts the state."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, Adam
from torch.testing import assert_close

from rotoopt import EqualWeighting, GradNorm, ProgressWeighting, RotoGradWeighting
from tests.asserts import assert_rotations, eps, relative_error
from tests.samplers import LAYOUTS, NUM_TASKS, SEEDS, Bench, Layout, Sampler

LAYOUT = st.sampled_from(LAYOUTS)
WEIGHTINGS = st.sampled_from([ProgressWeighting, RotoGradWeighting, EqualWeighting, GradNorm])


@st.composite
def dictated(draw: st.DrawFn) -> tuple[Bench, list[Tensor | None], Tensor]:
    """Draw a bench, gradients of some tasks, and the unit gradients of all (zero: absent)."""
    K, (shape, dim), sampler = draw(NUM_TASKS), draw(LAYOUT), Sampler(draw(SEEDS))
    absent = draw(st.sets(st.sampled_from(range(K)), max_size=K - 1))
    grads = sampler.normal(K, *shape) * sampler.log_scales(K, -2, 3).view(K, *[1] * len(shape))
    units = grads.flatten(1) / grads.flatten(1).norm(dim=1, keepdim=True)
    units[list(absent)] = 0
    present = [None if task in absent else grad for task, grad in enumerate(grads)]
    return Bench(shape, K, torch.float64, dim=dim), present, units


@given(drawn=dictated())
def test_cosines_are_those_of_the_gradients(drawn: tuple[Bench, list[Tensor | None], Tensor]) -> None:
    bench, grads, units = drawn
    bench.step(grads)
    assert_close(bench.record.cosines, units @ units.mT, rtol=0, atol=1e-14)


@given(drawn=dictated())
def test_alignment_is_the_cosine_with_the_mean_direction(drawn: tuple[Bench, list[Tensor | None], Tensor]) -> None:
    bench, grads, units = drawn
    bench.step(grads)
    present = [task for task, grad in enumerate(grads) if grad is not None]
    target = units[present].mean(dim=0)
    # If the target is short, its norm is a small difference of cosines.
    assert_close(bench.record.alignment, units @ target / target.norm(), rtol=0, atol=1e-13 / float(target.norm()) ** 2)


@given(drawn=dictated())
def test_norms_are_those_of_the_whole_gradients(drawn: tuple[Bench, list[Tensor | None], Tensor]) -> None:
    bench, grads, _ = drawn
    bench.step(grads)
    present = [task for task, grad in enumerate(grads) if grad is not None]
    expected = torch.stack([grad.norm() for grad in grads if grad is not None])
    assert_close(bench.record.grad_norms[present], expected, rtol=1e-13, atol=0)
    assert torch.equal(bench.record.present, torch.tensor([grad is not None for grad in grads]))


@given(drawn=dictated(), make=WEIGHTINGS)
def test_absent_tasks_have_norms_cosines_and_weights_of_zero(
    drawn: tuple[Bench, list[Tensor | None], Tensor], make: Any
) -> None:
    bench, grads, _ = drawn
    bench = Bench(bench.shape, bench.K, torch.float64, dim=-1, weighting=make())
    bench.step(grads)
    absent = [task for task, grad in enumerate(grads) if grad is None]
    for values in (bench.record.grad_norms, bench.record.cosines, bench.record.alignment, bench.record.weights):
        assert (values[absent] == 0).all()


@given(drawn=dictated(), seed=SEEDS)
def test_losses_are_recorded_unchanged(drawn: tuple[Bench, list[Tensor | None], Tensor], seed: int) -> None:
    bench, grads, _ = drawn
    values = Sampler(seed).normal(bench.K)
    bench.step(grads, values.tolist())
    expected = torch.where(torch.tensor([grad is None for grad in grads]), math.nan, values)
    assert bench.record.losses is not None
    assert_close(bench.record.losses, expected, rtol=0, atol=0, equal_nan=True)


@given(K=NUM_TASKS, layout=LAYOUT, seed=SEEDS, make=WEIGHTINGS, data=st.data())
def test_every_finite_scale_stays_finite(K: int, layout: Layout, seed: int, make: Any, data: st.DataObject) -> None:
    (shape, dim), sampler, weighting = layout, Sampler(seed, torch.float32), make()
    bench = Bench(shape, K, torch.float32, dim=dim, weighting=weighting, init="haar", burn_in_period=2)
    scale = st.one_of(st.sampled_from([0.0, 1e-30, 1e30]), st.floats(-30, 30).map(lambda power: 10.0**power))
    for step in range(4):
        if step == 0 or make is not ProgressWeighting:  # whose weights are proportional to the earlier gradients
            scales = torch.tensor(data.draw(st.lists(scale, min_size=K, max_size=K)))
        received = bench.step(list(sampler.normal(K, *shape) * scales.view(K, *[1] * len(shape))))
        assert received.isfinite().all()
        assert bench.record.weights.isfinite().all()
        assert bench.record.alignment.isfinite().all()
        assert bench.record.finite
        assert_rotations(bench.matrices)
        assert getattr(weighting, "weights", bench.record.weights).isfinite().all()


BAD_TASKS: dict[str, tuple[float, float]] = {  # factor of the gradient, loss
    "gradient is NaN": (math.nan, 1.0),
    "gradient is inf": (math.inf, 1.0),
    "loss is NaN": (1.0, math.nan),
    "loss is inf": (1.0, math.inf),
    "both are NaN": (math.nan, math.nan),
}


def bad_batch(bad: str, K: int, sampler: Sampler, shape: tuple[int, int] = (3, 4)) -> tuple[list[Tensor], list[float]]:
    """Draw gradients and losses, those of one task bad."""
    grads, values, task = sampler.normal(K, *shape), sampler.uniform(K), sampler.integer(K)
    factor, value = BAD_TASKS[bad]
    grads[task] *= factor
    values[task] = value
    return list(grads), values.tolist()


@pytest.mark.parametrize("bad", BAD_TASKS)
@given(K=NUM_TASKS, seed=SEEDS, weighting=WEIGHTINGS, adam=st.booleans(), good_steps=st.integers(0, 3))
def test_bad_batch_does_not_change_the_state(
    bad: str, K: int, seed: int, weighting: Any, adam: bool, good_steps: int
) -> None:
    sampler = Sampler(seed, torch.float32)
    options: dict[str, Any] = {"rotation_optimizer": partial(Adam, lr=0.1) if adam else None}
    options |= {"weighting": weighting(), "burn_in_period": 2}  # the bad batch may be the one after the burn-in
    bench = Bench((3, 4), K, torch.float32, rotation_size=4, **options)
    for _ in range(good_steps):
        bench.step(list(sampler.normal(K, 3, 4)), sampler.uniform(K).tolist())
    before = bench.state()
    bench.step(*bad_batch(bad, K, sampler))
    assert not bench.record.finite
    for name, tensor in bench.state().items():
        assert torch.equal(tensor.nan_to_num(-1.0), before[name].nan_to_num(-1.0)), name


@pytest.mark.parametrize("weighting", [ProgressWeighting, RotoGradWeighting, EqualWeighting, GradNorm])
def test_a_norm_that_overflows_does_not_change_the_state(weighting: Any) -> None:
    """The gradient is finite, its norm in float32 is not: it would become a reference."""
    bench = Bench((3, 4), 2, torch.float32, rotation_size=4, weighting=weighting())
    before = bench.state()
    bench.step([torch.full((3, 4), 2e38), torch.randn(3, 4)])
    assert not bench.record.finite
    for name, tensor in bench.state().items():
        assert torch.equal(tensor.nan_to_num(-1.0), before[name].nan_to_num(-1.0)), name


@given(K=NUM_TASKS, seed=SEEDS)
def test_good_batch_after_a_bad_one_counts_as_the_first(K: int, seed: int) -> None:
    sampler = Sampler(seed)
    grads = sampler.normal(K, 3, 4)
    spoiled, fresh = (Bench((3, 4), K, torch.float64) for _ in range(2))
    spoiled.step([*grads[1:], grads[0] * math.nan])
    for bench in (spoiled, fresh):
        bench.step(list(grads))
    assert (fresh.matrices != torch.eye(4).double()).flatten(1).any(1).all()
    # Only the index of the repaired column differs.
    assert relative_error(spoiled.matrices, fresh.matrices) <= 20 * eps(torch.float64)
    assert torch.equal(spoiled.record.weights, fresh.record.weights)


@pytest.mark.parametrize("bad", BAD_TASKS)
@given(K=NUM_TASKS, seed=SEEDS)
def test_bad_batch_adds_nothing_to_the_statistics_of_a_step(bad: str, K: int, seed: int) -> None:
    results = []
    for with_bad in (False, True):
        sampler, gradnorm = Sampler(seed), GradNorm()
        bench = Bench((4, 4), K, torch.float64, weighting=gradnorm, rotation_optimizer=partial(SGD, lr=0.1))
        bench.backward(list(sampler.normal(K, 4, 4)), sampler.uniform(K).tolist())
        if with_bad:  # it is not counted in the mean either
            bench.backward(*bad_batch(bad, K, sampler, (4, 4)))
        bench.optimizer.step()
        results.append((bench.matrices, gradnorm.logits.detach().clone()))
        assert (bench.matrices != torch.eye(4)).any()
    assert torch.equal(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])
