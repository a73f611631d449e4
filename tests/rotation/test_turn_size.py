"""Size, time and direction of the turns."""

import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from rotoopt._rotation import metric as cayley_metric
from rotoopt._rotation.cayley_step import CayleyStep, NormalizedStep
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.processes import Processes
from rotoopt.optimizer import TURN_EVERY
from tests.asserts import assert_same_bits
from tests.rotation.steps import cayley, turned, with_moment
from tests.samplers import NUM_SAMPLES, NUM_TASKS, SEEDS, SIZES, Bench, Sampler, haar, rotation_gradient, unusable

LOG_LRS = st.floats(-4, 1)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, lr=LOG_LRS)
def test_step_size_is_adagrad_norm(K: int, m: int, seed: int, lr: float) -> None:
    sampler, sizes, squares = Sampler(seed), nn.Parameter(torch.zeros(K).double()), torch.zeros(K).double()
    optimizer = NormalizedStep([sizes], lr=10**lr)
    for _ in range(4):
        sizes.grad = sampler.uniform(K) * sampler.log_scales(K, -3, 1)
        squares += sizes.grad.square()
        optimizer.step()
        assert_close(sizes.detach(), 10**lr / squares.sqrt(), rtol=1e-12, atol=0)
        assert_close(optimizer.state[sizes]["sum"], squares, rtol=1e-12, atol=0)  # its name in checkpoints
    sizes.grad = None
    before = sizes.detach().clone()
    optimizer.step()
    assert_same_bits(sizes.detach(), before)


@given(K=NUM_TASKS, seed=SEEDS, lr=st.just(0.0) | LOG_LRS.map(lambda log: 10**log))
def test_step_size_is_zero_before_the_first_gradient(K: int, seed: int, lr: float) -> None:
    sampler, sizes = Sampler(seed), nn.Parameter(torch.ones(K).double())
    optimizer, absent = NormalizedStep([sizes], lr), sampler.integer(K)
    for _ in range(2):
        sizes.grad = sampler.uniform(K) + 0.1
        sizes.grad[absent] = 0.0
        optimizer.step()
        assert [size > 0 for size in sizes.tolist()] == [lr > 0 and task != absent for task in range(K)]


def test_step_accepts_a_closure_like_every_optimizer_of_torch() -> None:
    optimizer = NormalizedStep([nn.Parameter(torch.zeros(2))], lr=0.1)
    with torch.no_grad():
        assert optimizer.step(lambda: 3.0 if torch.is_grad_enabled() else 0.0) == 3.0
    assert optimizer.step() is None


@given(K=NUM_TASKS, n=NUM_SAMPLES, m=SIZES, seed=SEEDS, one_for_all=st.booleans())
def test_no_plane_turns_by_more_than_a_radian(K: int, n: int, m: int, seed: int, one_for_all: bool) -> None:
    sampler = Sampler(seed)
    R, (units, target) = sampler.rotations(K, m), sampler.directions(K, n, m)
    if one_for_all:  # as large as a mean of unit gradients can be
        target = sampler.normal(n, m)
        target /= target.norm()
    z = sampler.normal(n, m) * sampler.log_scales(m, -2, 2)
    turns = R.mT @ turned(R, rotation_gradient(units, target, z), lr=1e6)
    angles = torch.linalg.eigvals(turns).angle().abs()
    assert angles.max() <= 2 * math.atan(1 / 2) + 1e-9  # that of cay(S) with ||S||_2 = 1: 0.93


@given(K=NUM_TASKS, n=NUM_SAMPLES, m=st.integers(2, 24), seed=SEEDS, scale=LOG_LRS)
def test_lr_is_the_relative_change_of_the_inputs_of_heads(K: int, n: int, m: int, seed: int, scale: float) -> None:
    """Root mean square in the first turn, for any scale of z; on the data itself, it is an upper bound."""
    sampler, lr = Sampler(seed), 1e-6
    R, (gradient, C) = sampler.rotations(K, m), with_moment(sampler, K, n, m)
    assert gradient.second_moment is not None
    moved = turned(R, replace(gradient, second_moment=10**scale * gradient.second_moment), lr=lr) - R
    G = C + cayley_metric.DAMPING * torch.eye(m)
    sizes = torch.einsum("kij,jl,kil->k", moved, G, moved).div(m).sqrt()
    assert_close(sizes, torch.full((K,), lr).double(), rtol=1e-2, atol=0)
    assert (torch.einsum("kij,jl,kil->k", moved, C, moved) <= m * (1.01 * lr) ** 2).all()


@given(K=NUM_TASKS, n=NUM_SAMPLES, m=st.integers(2, 24), seed=SEEDS)
def test_direction_is_the_steepest_in_the_metric(K: int, n: int, m: int, seed: int) -> None:
    sampler, lr = Sampler(seed), 1e-7
    R, (gradient, C) = sampler.rotations(K, m), with_moment(sampler, K, n, m)
    N, inverse = gradient.correlation(m), (C + cayley_metric.DAMPING * torch.eye(m)).inverse()
    wanted = inverse @ (N - N.mT) @ inverse
    found = R.mT @ turned(R, gradient, lr=lr) - torch.eye(m)
    cosines = torch.cosine_similarity(found.flatten(1), wanted.flatten(1))
    assert_close(cosines, torch.ones(K).double(), rtol=0, atol=1e-6)


@given(K=NUM_TASKS, n=NUM_SAMPLES, m=st.integers(2, 24), seed=SEEDS, share=st.floats(0, 1))
def test_turns_follow_the_schedule_of_the_network(K: int, n: int, m: int, seed: int, share: float) -> None:
    sampler, angles = Sampler(seed), []
    gradient, rotations = rotation_gradient(*sampler.directions(K, n, m)), haar(K, m, torch.float64)
    for factor in (1.0, share):
        network = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        step = CayleyStep(rotations, 1e-6, Processes(), network)
        step.step([unusable(gradient)])  # the highest rate was seen before
        network.param_groups[0]["lr"] *= factor
        angle = step.step([gradient])
        assert angle is not None
        angles.append(angle)
    assert_close(angles[1], share * angles[0], rtol=1e-3, atol=1e-12)


@given(K=NUM_TASKS, n=NUM_SAMPLES, m=st.integers(2, 24), seed=SEEDS)
def test_turns_are_smaller_for_tasks_with_small_remaining_losses(K: int, n: int, m: int, seed: int) -> None:
    sampler, angles = Sampler(seed), []
    gradient, remaining = rotation_gradient(*sampler.directions(K, n, m)), sampler.uniform(K)
    for factors in (None, remaining):
        angle = cayley(haar(K, m, torch.float64), lr=1e-6).step([gradient], factors)
        assert angle is not None
        angles.append(angle)
    assert_close(angles[1], remaining * angles[0], rtol=1e-3, atol=1e-12)


def test_rotations_turn_every_few_steps() -> None:
    sampler, moved = Sampler(0), []
    bench = Bench((4, 6), 3, torch.float64, rotation_size=6, turn_every=None)
    grads = list(sampler.normal(3, 4, 6))
    for _ in range(2 * TURN_EVERY + 1):
        before = bench.matrices
        bench.step(grads)
        moved.append(not torch.equal(bench.matrices, before))
    assert [step for step, each in enumerate(moved) if each] == [0, TURN_EVERY, 2 * TURN_EVERY]


def test_step_sizes_are_on_the_device_of_the_rotations() -> None:
    options: dict[str, Any] = {"device": torch.device("meta"), "dtype": torch.float64}
    rotations = Rotations(2, 4, rotate=[True, True], init="identity", **options)
    (sizes,) = cayley(rotations, 0.1).optimizer.param_groups[0]["params"]
    assert {"device": sizes.device, "dtype": sizes.dtype} == options


def test_loaded_step_has_the_dtype_of_its_rotations() -> None:
    sampler = Sampler(0)
    saved = cayley(haar(2, 4, torch.float64), 0.1)
    saved.step([rotation_gradient(*sampler.directions(2, 6, 4), sampler.normal(6, 4))])
    loaded = cayley(haar(2, 4, torch.float32), 0.1)
    assert loaded.optimizer.param_groups[0]["lr"] == 0.1
    loaded.load_state_dict(saved.state_dict())
    state = loaded.state_dict()
    assert state["metric"]["mean"].dtype == torch.float32
    assert_close(state["metric"]["mean"], saved.state_dict()["metric"]["mean"].float())
    assert state["schedule"] == {"highest": 0.1}


@given(K=NUM_TASKS, n=NUM_SAMPLES, m=st.integers(2, 24), seed=SEEDS)
def test_angles_are_the_root_mean_square_over_all_vectors(K: int, n: int, m: int, seed: int) -> None:
    sampler = Sampler(seed)
    rotations, gradients = haar(K, m, torch.float64), rotation_gradient(*sampler.directions(K, n, m))
    step = cayley(rotations, 1e-5)
    for _ in range(2):
        before = rotations.matrices.clone()
        angles = step.step([gradients])
    moved = torch.linalg.matrix_norm(rotations.matrices - before)  # of m unit vectors, each by its angle
    assert_close(angles, moved / m**0.5, rtol=1e-3, atol=1e-12)
