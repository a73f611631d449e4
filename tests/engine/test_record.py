"""``last_step`` describes the last step."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import EqualWeighting, RotoGradOptimizer
from rotoopt._engine.record import alignment, conflict_rate
from rotoopt._rotation.cayley import orthogonality_error
from tests.samplers import NUM_TASKS, SEEDS, SIZES, Bench, Sampler


@given(K=NUM_TASKS, seed=SEEDS, data=st.data())
def test_conflicts_and_alignment_are_those_of_the_present_gradients(K: int, seed: int, data: st.DataObject) -> None:
    absent = data.draw(st.sets(st.sampled_from(range(K)), max_size=K - 1))
    bench, grads = Bench((3, 4), K, torch.float64, rotate=False), Sampler(seed).normal(K, 12)
    bench.backward([None if task in absent else grad.view(3, 4) for task, grad in enumerate(grads)])
    kept = [task for task in range(K) if task not in absent]
    units = grads[kept] / grads[kept].norm(dim=1, keepdim=True)
    pairs = [(i, j) for i in range(len(kept)) for j in range(i)]
    conflicts = sum(float(units[i] @ units[j]) < 0 for i, j in pairs)
    assert_close(bench.record.conflict_rate.double(), torch.tensor(conflicts / max(1, len(pairs))).double())
    target = units.mean(dim=0)
    assert_close(bench.record.alignment[kept], units @ target / target.norm(), rtol=1e-10, atol=1e-12)
    assert (bench.record.alignment[sorted(absent)] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@given(K=NUM_TASKS, seed=SEEDS, data=st.data())
def test_gradient_that_is_not_finite_has_no_direction(value: float, K: int, seed: int, data: st.DataObject) -> None:
    absent = data.draw(st.sets(st.integers(1, K - 1), max_size=K - 1))
    bench, grads = Bench((3, 4), K, torch.float32, rotate=False), list(Sampler(seed, torch.float32).normal(K, 3, 4))
    grads[0][data.draw(st.integers(0, 2)), 1] = value
    bench.backward([None if task in absent else grad for task, grad in enumerate(grads)])
    assert not bench.record.finite
    assert bench.record.alignment.isnan().all()
    assert bench.record.conflict_rate.isnan()


def test_loss_that_is_not_finite_makes_a_step_that_was_not_measured() -> None:
    """Its gradients may be finite, but the record only shows gradients that the rotations use."""
    bench = Bench((3, 4), 2, torch.float32)
    bench.backward(list(torch.randn(2, 3, 4)), [1.0, math.inf])
    assert bench.record.cosines.isfinite().all()
    assert bench.record.alignment.isnan().all()
    assert bench.record.conflict_rate.isnan()


@pytest.mark.parametrize("own_optimizer", [False, True])
@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_angles_are_those_between_vectors_before_and_after(own_optimizer: bool, K: int, m: int, seed: int) -> None:
    """The chord of the angle, |R' - R|_F / sqrt(m), is that angle to second order."""
    sampler = Sampler(seed)
    options = {"rotation_optimizer": partial(SGD, lr=1e-2)} if own_optimizer else {"rotation_lr": 1e-3}
    bench = Bench((2, m), K, torch.float64, init="haar", rotation_size=m, **options)
    common, total = sampler.normal(K, 2, m), torch.zeros(K).double()
    for _ in range(4):
        before = bench.matrices
        bench.backward(list(common + 0.1 * sampler.normal(K, 2, m)))
        assert (bench.record.angles == 0).all()
        assert_close(bench.record.total_angles, total, rtol=1e-3, atol=1e-9)
        bench.optimizer.step()
        chord = (bench.matrices - before).flatten(1).norm(dim=1) / math.sqrt(m)
        assert_close(bench.record.angles, chord, rtol=1e-3, atol=1e-9)
        total += chord
    assert_close(bench.record.total_angles, total, rtol=1e-3, atol=1e-9)
    assert (total > 0).all()


def test_steps_count_and_rates_are_those_of_the_scheduler() -> None:
    bench = Bench((3, 4), 2, torch.float32, rotation_lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(bench.optimizer.rotation_optimizer, 0.5)
    for step in range(3):
        bench.step(list(torch.randn(2, 3, 4)))
        assert bench.record.step == step
        assert bench.record.rotation_lr == 0.5 ** (step + 1)
        scheduler.step()


def test_orthogonality_error_is_the_current_one() -> None:
    bench = Bench((3, 4), 2, torch.float32, init="haar", rotation_lr=0.1)
    bench.step(list(torch.randn(2, 3, 4)))
    assert_close(bench.record.orthogonality_error, orthogonality_error(bench.matrices))
    assert bench.record.orthogonality_error.shape == (2,)


def test_reading_the_record_changes_nothing() -> None:
    matrices = []
    for look in (False, True):
        bench = Bench((3, 4), 3, torch.float32, weighting=EqualWeighting(), rotation_lr=0.1)
        for grads in torch.randn(5, 3, 3, 4, generator=torch.Generator().manual_seed(0)):
            bench.step(list(grads))
            if look:
                record = bench.record
                assert record.orthogonality_error.isfinite().all()
                assert record.alignment.isfinite().all()
                assert record.conflict_rate.isfinite()
        matrices.append(bench.matrices)
    assert torch.equal(*matrices)


def test_record_of_an_earlier_step_does_not_change() -> None:
    bench = Bench((3, 4), 2, torch.float32, rotation_lr=0.1)
    bench.step(list(torch.randn(2, 3, 4)))
    record = bench.record
    kept = [record.cosines.clone(), record.angles.clone(), record.total_angles.clone(), record.grad_norms.clone()]
    bench.step(list(torch.randn(2, 3, 4)))
    bench.step(list(torch.randn(2, 3, 4)))
    for now, then in zip([record.cosines, record.angles, record.total_angles, record.grad_norms], kept, strict=True):
        assert torch.equal(now, then)


@given(K=NUM_TASKS, seed=SEEDS, data=st.data())
def test_record_has_the_latest_pass_of_each_task(K: int, seed: int, data: st.DataObject) -> None:
    """Passes of the previous step are not included."""
    sampler = Sampler(seed)
    bench = Bench((3, 4), K, torch.float64, rotate=False)
    present = st.sets(st.sampled_from(range(K)), min_size=1)
    for _ in range(2):
        norms, losses, weights = torch.zeros(K).double(), torch.full((K,), math.nan).double(), torch.zeros(K).double()
        for tasks in data.draw(st.lists(present, min_size=1, max_size=3)):
            grads, values, now = sampler.normal(K, 3, 4), sampler.uniform(K), sorted(tasks)
            bench.backward([grad if task in tasks else None for task, grad in enumerate(grads)], values.tolist())
            norms[now], losses[now] = grads.flatten(1).norm(dim=1)[now], values[now]
            weights[now] = bench.record.weights[now]
            assert_close(bench.record.grad_norms, norms, rtol=1e-13, atol=0)
            assert torch.equal(bench.record.weights, weights)
            assert bench.record.losses is not None
            assert_close(bench.record.losses, losses, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(bench.record.present, ~losses.isnan())
        bench.optimizer.step()


@given(K=NUM_TASKS, seed=SEEDS)
def test_cosines_are_nan_before_gradients_were_collected(K: int, seed: int) -> None:
    """After loading, until the next update of the rotations."""
    sampler = Sampler(seed, torch.float32)
    trained, resumed = (Bench((3, 4), K, torch.float32, weighting=EqualWeighting(), turn_every=3) for _ in range(2))
    trained.step(list(sampler.normal(K, 3, 4)))
    resumed.optimizer.load_state_dict(trained.optimizer.state_dict())
    resumed.step(list(sampler.normal(K, 3, 4)))
    assert resumed.record.cosines.shape == (K, K)
    assert resumed.record.cosines.isnan().all()


@given(K=NUM_TASKS, seed=SEEDS, T=st.integers(1, 5))
def test_measures_of_many_steps_at_once_are_those_of_each(K: int, seed: int, T: int) -> None:
    sampler = Sampler(seed)
    grads, finite = sampler.normal(T, K, 3), sampler.uniform(T) < 0.7
    present = sampler.uniform(T, K) < 0.7
    units = grads / grads.norm(dim=-1, keepdim=True) * present[..., None]
    cosines = units @ units.mT
    for several, each in (
        (alignment(cosines, finite), map(alignment, cosines, finite)),
        (conflict_rate(cosines, present, finite), map(conflict_rate, cosines, present, finite)),
    ):
        # Sums of K cosines, of numbers up to one, in any order; divided by the length of their mean.
        assert_close(several, torch.stack(list(each)), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_gradients_that_cancel_each_other_have_no_target() -> None:
    cosines = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert torch.equal(alignment(cosines, torch.tensor(True)), torch.zeros(2))


@pytest.mark.parametrize("shared", [True, False])
def test_norms_are_exact_although_the_network_has_become_wider(shared: bool) -> None:
    """Of float64 gradients, with an optimizer that was built for float32 parameters."""
    z, heads = nn.Parameter(torch.zeros(5, 4).double()), [nn.Identity(), nn.Identity()]
    optimizer = RotoGradOptimizer(SGD([nn.Parameter(torch.zeros(1)), z], lr=0.1), heads)
    for _ in range(4):  # the weights of the first two steps are computed from gradients of these steps
        optimizer.step([(head(z if shared else z + 0) / 3).sum() for head in heads])
        assert optimizer.last_step is not None
        expected = torch.full((2,), 20**0.5 / 3, dtype=torch.float64)
        assert_close(optimizer.last_step.grad_norms, expected, rtol=1e-12, atol=0)
