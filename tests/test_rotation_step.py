"""The rotation step: its gradient is that of the objective, and a step never loses alignment."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.testing import assert_close

from rotoopt.representation import RotatedDims
from rotoopt.rotation_step import MAX_STEP, NormalizedStep, RotationStep, rotation_gradient
from rotoopt.rotations import Rotations
from tests.asserts import assert_rotations, eps, relative_error
from tests.oracle import cayley_step
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, SIZES, Bench, Sampler

LOG_LRS = st.floats(-4, 1)
TRUE = torch.tensor(True)


def haar(K: int, m: int, dtype: torch.dtype) -> Rotations:
    return Rotations(K, m, rotate=[True] * K, init="haar", device=torch.device("cpu"), dtype=dtype)


def views(units: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit gradients ``(K, n, d)`` and their mean ``(n, d)`` as the package sees them."""
    dims = RotatedDims(-1)
    return dims.view_stacked(units), dims.view(target)


@given(n=st.integers(1, 6), m=SIZES, rest=st.integers(0, 3), seed=SEEDS)
def test_rotation_gradient_is_that_of_the_objective(n: int, m: int, rest: int, seed: int) -> None:
    units, target = Sampler(seed).directions(2, n, m + rest)
    coordinates, identity = torch.zeros(2, m, m, dtype=torch.float64, requires_grad=True), torch.eye(m).double()
    S = coordinates.tril(-1) - coordinates.tril(-1).mT
    turned = torch.stack([units[k, :, :m] @ cayley_step(identity, S[k]) for k in range(2)])  # rows: cay(S)' u
    (expected,) = torch.autograd.grad(-(turned * target[:, :m]).sum(), coordinates)
    assert_close(rotation_gradient(*views(units, target), m), expected, rtol=1e-12, atol=1e-15)


@given(K=NUM_TASKS, n=st.integers(1, 8), m=SIZES, rest=st.integers(0, 3), seed=SEEDS, lr=LOG_LRS, dtype=DTYPES)
def test_step_does_not_lower_the_alignment_of_its_batch(
    K: int, n: int, m: int, rest: int, seed: int, lr: float, dtype: torch.dtype
) -> None:
    sampler, rotations = Sampler(seed, dtype), haar(K, m, dtype)
    step = RotationStep(rotations, lambda params: NormalizedStep(params, lr=10**lr))
    at_heads = sampler.normal(K, n, m + rest) + sampler.normal(n, m + rest)  # one gradient per task and sample

    def units() -> Tensor:
        at_rep = torch.cat([at_heads[..., :m] @ rotations.matrices, at_heads[..., m:]], dim=2)
        lengths: Tensor = torch.linalg.vector_norm(at_rep, dim=(1, 2), keepdim=True)
        return at_rep / lengths

    before = units()
    target = before.mean(dim=0)  # what the gradients are to agree with does not move
    step.collect(*views(before, target), TRUE)
    step.step()
    gained = ((units() - before).double() * target.double()).sum(dim=(1, 2))
    # Each alignment is a sum over unit vectors, so its rounding is some eps, whatever its size.
    assert gained.min() >= -10 * m * eps(dtype)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, lr=LOG_LRS)
def test_steps_on_one_batch_bring_the_gradients_together(K: int, m: int, seed: int, lr: float) -> None:
    sampler = Sampler(seed)
    bench, lengths = Bench((4, m), K, torch.float64, rotation_lr=10**lr), []
    at_heads = list(sampler.normal(K, 4, m))
    for _ in range(4):
        bench.step(at_heads)
        lengths.append(float(bench.record.alignment.sum()))  # K times the length of the target
    assert lengths == sorted(lengths)
    assert lengths[-1] > lengths[0]


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, lr=LOG_LRS)
def test_step_size_is_adagrad_norm_with_a_cap(K: int, m: int, seed: int, lr: float) -> None:
    sampler = Sampler(seed)
    coordinates = nn.Parameter(torch.zeros(K, m, m, dtype=torch.float64))
    optimizer, squares = NormalizedStep([coordinates], lr=10**lr), torch.zeros(K, dtype=torch.float64)
    for _ in range(4):
        grad = sampler.normal(K, m, m).tril(-1) * sampler.log_scales(K, -3, 1)[:, None, None]
        coordinates.grad, before = grad, coordinates.detach().clone()
        optimizer.step()
        squares += grad.square().sum(dim=(1, 2))
        eta = (10**lr * math.sqrt(m * (m - 1) / 2) / squares.sqrt()).clamp(max=1.0)
        assert_close(before - coordinates.detach(), eta[:, None, None] * grad, rtol=1e-10, atol=1e-13)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_lr_is_the_root_mean_square_turn_of_the_first_step(K: int, m: int, seed: int) -> None:
    coordinates = nn.Parameter(torch.zeros(K, m, m, dtype=torch.float64))
    coordinates.grad = 1e6 * Sampler(seed).normal(K, m, m).tril(-1)
    NormalizedStep([coordinates], lr=1e-3).step()
    mean_square = coordinates.detach().square().sum(dim=(1, 2)) / (m * (m - 1) / 2)
    assert_close(mean_square.sqrt(), torch.full((K,), 1e-3).double(), rtol=1e-6, atol=0)


def test_zero_gradient_is_no_step() -> None:
    coordinates = nn.Parameter(torch.zeros(2, 3, 3))
    coordinates.grad = torch.zeros(2, 3, 3)
    NormalizedStep([coordinates], lr=1.0).step()
    assert torch.equal(coordinates, torch.zeros(2, 3, 3))


def test_cap_is_where_the_gradient_is_trusted() -> None:
    assert MAX_STEP == 1.0


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, passes=st.integers(1, 4))
def test_several_backwards_are_averaged(K: int, m: int, seed: int, passes: int) -> None:
    sampler = Sampler(seed)
    bench = Bench((4, m), K, torch.float64)
    (coordinates,) = bench.optimizer.rotation_optimizer.param_groups[0]["params"]
    expected = torch.zeros(K, m, m).double()
    for _ in range(passes):
        grads = sampler.normal(K, 4, m)  # also those at the representation: the rotations are identities
        bench.backward(list(grads))
        units = grads / grads.norm(dim=(1, 2), keepdim=True)
        expected += rotation_gradient(*views(units, units.mean(dim=0)), m) / passes
    assert_close(coordinates.grad, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.3, momentum=0.9), lambda p: Adam(p, lr=0.1)])
@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_any_optimizer_turns_by_its_own_update(make: Any, K: int, m: int, seed: int) -> None:
    sampler = Sampler(seed)
    bench = Bench((4, m), K, torch.float64, rotation_optimizer=make)
    update = torch.zeros(K, m, m).double()  # what the same optimizer does to a free parameter
    twin: Optimizer = make([update])
    for _ in range(3):
        old = bench.matrices if bench.optimizer.rotations.size else torch.eye(m).double().expand(K, m, m)
        grads = sampler.normal(K, 4, m)
        units = grads @ old
        units = units / units.norm(dim=(1, 2), keepdim=True)
        update.grad = rotation_gradient(*views(units, units.mean(dim=0)), m)
        update.zero_()
        twin.step()
        bench.step(list(grads))
        S = update.tril(-1) - update.tril(-1).mT
        assert relative_error(bench.matrices, torch.stack(list(map(cayley_step, old, S)))) <= 1e-12


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES, scale=st.floats(-30, 30), lr=LOG_LRS)
def test_rotations_stay_rotations(K: int, m: int, seed: int, dtype: torch.dtype, scale: float, lr: float) -> None:
    sampler = Sampler(seed, dtype)
    bench = Bench((4, m), K, dtype, rotation_lr=10**lr, init="haar")
    for _ in range(5):
        bench.step(
            [10**scale * grad if sampler.integer(4) else None for grad in sampler.normal(K - 1, 4, m)]
            + [10**scale * sampler.normal(4, m)]
        )
    assert_rotations(bench.matrices)


@given(m=SIZES, seed=SEEDS, log_lr=st.floats(0, 6), dtype=DTYPES)
def test_rotations_stay_rotations_under_a_reckless_optimizer(
    m: int, seed: int, log_lr: float, dtype: torch.dtype
) -> None:
    sampler = Sampler(seed, dtype)
    bench = Bench((4, m), 3, dtype, rotation_optimizer=lambda params: SGD(params, lr=10**log_lr))
    for _ in range(3):
        bench.step(list(sampler.normal(3, 4, m)))
    assert_rotations(bench.matrices)


@given(K=NUM_TASKS, seed=SEEDS, haar=st.booleans())
def test_one_feature_cannot_turn(K: int, seed: int, haar: bool) -> None:
    bench = Bench((4, 1), K, torch.float32, init="haar" if haar else "identity", rotation_lr=1.0)
    for grads in Sampler(seed, torch.float32).normal(3, K, 4, 1):
        bench.step(list(grads))
    assert torch.equal(bench.matrices, torch.ones(K, 1, 1))


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_tasks_that_are_not_rotated_count_in_the_target_and_stay(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    sampler = Sampler(seed, dtype)
    off, grads = sampler.integer(K), sampler.normal(K, 4, m)
    bench = Bench((4, m), K, dtype, rotate=[task != off for task in range(K)])
    everyone = Bench((4, m), K, dtype)
    for each in (bench, everyone):
        each.step(list(grads))
    expected = everyone.matrices
    expected[off] = torch.eye(m, dtype=dtype)
    assert torch.equal(bench.matrices, expected)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_target_is_the_mean_of_the_present_tasks(K: int, m: int, seed: int) -> None:
    sampler = Sampler(seed)
    grads = list(sampler.normal(K, 4, m))
    bench, fewer = Bench((4, m), K + 1, torch.float64), Bench((4, m), K, torch.float64)
    absent = sampler.integer(K + 1)
    for _ in range(2):
        bench.step([*grads[:absent], None, *grads[absent:]])
        fewer.step(grads)
    kept = [task for task in range(K + 1) if task != absent]
    assert_close(bench.matrices[kept], fewer.matrices, rtol=0, atol=1e-14)
    assert torch.equal(bench.matrices[absent], torch.eye(m).double())


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_a_task_alone_in_the_batch_moves_nothing(K: int, m: int, seed: int) -> None:
    sampler = Sampler(seed)
    bench = Bench((4, m), K, torch.float64, rotation_optimizer=lambda params: Adam(params, lr=0.1))
    bench.step(list(sampler.normal(K, 4, m)))  # so that Adam has momentum
    before, alone = bench.matrices, sampler.integer(K)
    bench.step([sampler.normal(4, m) if task == alone else None for task in range(K)])
    assert torch.equal(bench.matrices, before)
