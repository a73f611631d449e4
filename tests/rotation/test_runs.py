"""Runs of the built-in rotation step: invariances, and steps that do not change the rotations."""

import copy
import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR
from torch.testing import assert_close

from rotoopt.optimizer import DEFAULT_ROTATION_LR
from tests.asserts import assert_rotations, assert_same_bits
from tests.samplers import DTYPES, LAYOUTS, NUM_TASKS, SEEDS, SIZES, Bench, Layout, Sampler

LAYOUT = st.sampled_from(LAYOUTS)
LOG_LRS = st.floats(-4, 1)


def data(sampler: Sampler, K: int, *shape: int, steps: int = 4) -> list[list[Tensor]]:
    """Draw gradients of some steps that agree partly, so that rotations turn."""
    common = sampler.normal(K, *shape)
    return [list(common + 0.3 * sampler.normal(K, *shape)) for _ in range(steps)]


def run(bench: Bench, steps: list[list[Tensor]]) -> Tensor:
    for grads in steps:
        bench.step(grads)
    return bench.matrices


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, lr=LOG_LRS)
def test_steps_on_one_batch_align_the_gradients(K: int, m: int, seed: int, lr: float) -> None:
    bench, lengths = Bench((4, m), K, torch.float64, rotation_lr=10**lr), []
    at_heads = list(Sampler(seed).normal(K, 4, m))
    for _ in range(5):
        bench.step(at_heads)
        lengths.append(float(bench.record.alignment.sum()))  # K times the length of the target
    assert all(after >= before - 1e-12 for before, after in pairwise(lengths))
    assert lengths[-1] > lengths[0]


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES, scale=st.floats(-30, 30), lr=LOG_LRS)
def test_rotations_stay_rotations(K: int, m: int, seed: int, dtype: torch.dtype, scale: float, lr: float) -> None:
    sampler = Sampler(seed, dtype)
    bench = Bench((4, m), K, dtype, rotation_lr=10**lr, init="haar")
    for first, *rest in data(sampler, K, 4, m, steps=6):
        bench.step([10**scale * grad if sampler.integer(4) else None for grad in rest] + [10**scale * first])
    assert_rotations(bench.matrices)


@given(layout=LAYOUT, K=NUM_TASKS, seed=SEEDS, scale=st.floats(-8, 8))
def test_scale_of_the_gradients_does_not_matter(layout: Layout, K: int, seed: int, scale: float) -> None:
    (shape, dim), sampler = layout, Sampler(seed)
    steps, scales = data(sampler, K, *shape), 10**scale * sampler.log_scales(K, -3, 3)
    scaled = [[grad * s for grad, s in zip(grads, scales, strict=True)] for grads in steps]
    one, other = (Bench(shape, K, torch.float64, dim=dim, rotation_lr=0.1) for _ in range(2))
    assert_close(run(one, scaled), run(other, steps), rtol=0, atol=1e-12)


@given(K=NUM_TASKS, seed=SEEDS, channels=st.sampled_from([3, 16]))
def test_positions_of_a_map_are_samples(K: int, seed: int, channels: int) -> None:
    maps = data(Sampler(seed), K, 2, channels, 2, 1)
    rows = [[grad.movedim(1, -1).reshape(-1, channels) for grad in grads] for grads in maps]
    convolutional = Bench((2, channels, 2, 1), K, torch.float64, dim=1, rotation_lr=0.1)
    assert_close(run(convolutional, maps), run(Bench((4, channels), K, torch.float64, rotation_lr=0.1), rows))


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_tasks_without_rotation_count_in_the_target(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    sampler = Sampler(seed, dtype)
    off, grads = sampler.integer(K), list(sampler.normal(K, 4, m))
    bench = Bench((4, m), K, dtype, rotate=[task != off for task in range(K)])
    expected = run(Bench((4, m), K, dtype), [grads])  # not two: the target would depend on rotation `off`
    expected[off] = torch.eye(m, dtype=dtype)
    assert torch.equal(run(bench, [grads]), expected)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_target_is_the_mean_of_the_present_tasks(K: int, m: int, seed: int) -> None:
    sampler = Sampler(seed)
    steps, absent = data(sampler, K, 4, m), sampler.integer(K + 1)
    bench, fewer = Bench((4, m), K + 1, torch.float64), Bench((4, m), K, torch.float64)
    for grads in steps:
        bench.step([*grads[:absent], None, *grads[absent:]])
        fewer.step(grads)
    kept = [task for task in range(K + 1) if task != absent]
    assert_close(bench.matrices[kept], fewer.matrices, rtol=0, atol=1e-14)
    assert torch.equal(bench.matrices[absent], torch.eye(m).double())


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_steps_without_effect_and_storage_of_the_rotations(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    sampler = Sampler(seed, dtype)
    steps, bench = data(sampler, K, 4, m), Bench((4, m), K, dtype, rotation_size=m, rotation_lr=0.1)
    storage = bench.optimizer.rotations.matrices.data_ptr()
    before, alone = run(bench, steps), sampler.integer(K)
    bench.step([grad if task == alone else None for task, grad in enumerate(steps[0])])
    bench.step([grad * math.nan for grad in steps[0]])
    bench.step([torch.zeros_like(grad) for grad in steps[0]])
    assert_same_bits(bench.matrices, before)
    assert bench.optimizer.rotations.matrices.data_ptr() == storage


@pytest.mark.parametrize("make", [None, Adam], ids=["built-in", "Adam"])
@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_autocast_around_the_step_changes_nothing(make: Any, K: int, m: int, seed: int) -> None:
    steps = data(Sampler(seed, torch.float32), K, 4, m)
    one, other = (Bench((4, m), K, torch.float32, rotation_lr=0.1, rotation_optimizer=make) for _ in range(2))
    for grads in steps:
        for bench in (one, other):
            bench.backward(grads)
            with torch.autocast("cpu", torch.bfloat16, enabled=bench is other):
                bench.optimizer.step()
    assert_same_bits(other.matrices, one.matrices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_representations_of_low_precision(dtype: torch.dtype, K: int, m: int, seed: int) -> None:
    steps = [[grad.to(dtype) for grad in grads] for grads in data(Sampler(seed, torch.float32), K, 4, m, steps=1)] * 3
    matrices = run(Bench((4, m), K, dtype, rotation_lr=0.1, rotation_size=m), steps)
    assert matrices.dtype == torch.float32
    assert_rotations(matrices)
    assert (matrices != torch.eye(m)).any()


@given(K=NUM_TASKS, layout=LAYOUT, seed=SEEDS, dtype=DTYPES, saved=st.integers(0, 4))
def test_resumed_runs_equal_uninterrupted_ones(
    K: int, layout: Layout, seed: int, dtype: torch.dtype, saved: int
) -> None:
    (shape, dim), steps = layout, data(Sampler(seed, dtype), K, *layout[0])
    whole, one, other = (Bench(shape, K, dtype, dim=dim, rotation_lr=0.1) for _ in range(3))
    for grads in steps[:saved]:
        one.step(grads)
    other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    for grads in steps[saved:]:
        other.step(grads)
    if saved < len(steps):
        assert_same_bits(other.matrices, run(whole, steps))


def test_scheduler_of_the_rotations_gives_no_warning() -> None:
    """Even in steps without an update."""
    bench, sampler = Bench((4, 6), 3, torch.float64, turn_every=8), Sampler(0)
    scheduler = ExponentialLR(bench.optimizer.rotation_optimizer, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for grads in data(sampler, 3, 4, 6, steps=10):
            bench.step(grads)
            scheduler.step()
    assert scheduler.get_last_lr() == [DEFAULT_ROTATION_LR * 0.5**10]
