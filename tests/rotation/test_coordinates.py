"""Rotations updated by an optimizer of the user: the recipe of geotorch, and its chain rule."""

from functools import partial
from typing import Any

import geotorch
import pytest
import torch
from geotorch.utils import update_base
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.testing import assert_close

from rotoopt import Rotations
from rotoopt._rotation.coordinates import Coordinates, OptimizerStep
from rotoopt._torch.processes import Processes
from tests.asserts import assert_rotations, assert_same_bits, relative_error
from tests.oracle import cayley_step
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, SIZES, Bench, Sampler, haar, rotation_gradient

# Without eps, Adam divides a gradient by its own size: entries that nearly cancel would give steps of rounding errors.
OPTIMIZERS: dict[str, Any] = {"SGD": partial(SGD, lr=0.3, momentum=0.9), "Adam": partial(Adam, lr=0.05, eps=1e-3)}


def coordinate_gradient(units: Tensor, target: Tensor, m: int) -> Tensor:
    coordinates = Coordinates(haar(len(units), m, units.dtype), Processes())
    return coordinates.gradient([rotation_gradient(units, target)])


@given(n=st.integers(1, 6), m=SIZES, rest=st.integers(0, 3), seed=SEEDS)
def test_coordinate_gradient_is_that_of_the_objective(n: int, m: int, rest: int, seed: int) -> None:
    units, target = Sampler(seed).directions(2, n, m + rest)
    coordinates, identity = torch.zeros(2, m, m, dtype=torch.float64, requires_grad=True), torch.eye(m).double()
    S = coordinates.tril(-1) - coordinates.tril(-1).mT
    turned = torch.stack([units[k, :, :m] @ cayley_step(identity, S[k]) for k in range(2)])  # rows: cay(S)' u
    (expected,) = torch.autograd.grad(-(turned * target[:, :m]).sum(), coordinates)
    assert_close(coordinate_gradient(units, target, m), expected, rtol=1e-12, atol=1e-15)


def test_coordinates_are_created_on_the_device_of_the_rotations() -> None:
    options: dict[str, Any] = {"device": torch.device("meta"), "dtype": torch.float64}
    rotations = Rotations(2, None, rotate=[True, True], init="identity", **options)
    coordinates = Coordinates(rotations, Processes())
    parameter = coordinates.parameter
    assert parameter.shape == (2, 0, 0)
    assert {"device": parameter.device, "dtype": parameter.dtype} == options
    rotations.create(5)
    coordinates.fit()
    assert coordinates.parameter is parameter
    assert parameter.shape == (2, 5, 5)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_representation_may_be_wider_than_the_network(K: int, m: int, seed: int) -> None:
    """Its gradients are float64, the rotations are float32."""
    units, target = Sampler(seed).directions(K, 4, m)
    gradient = Coordinates(haar(K, m, torch.float32), Processes()).gradient([rotation_gradient(units, target)])
    assert torch.equal(gradient, coordinate_gradient(units, target, m).float())


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_turn_applies_the_coordinates_and_resets_them_to_zero(K: int, m: int, seed: int) -> None:
    sampler, rotations = Sampler(seed), haar(K, m, torch.float64)
    coordinates, before, A = Coordinates(rotations, Processes()), rotations.matrices.clone(), sampler.normal(K, m, m)
    coordinates.parameter.data.copy_(A)
    angles = coordinates.turn()
    S = A.tril(-1) - A.tril(-1).mT
    expected = torch.stack([cayley_step(old, each) for old, each in zip(before, S, strict=True)])
    assert_close(rotations.matrices, expected, rtol=0, atol=1e-10)  # the condition of the turn is |S|^2 / 4
    assert_close(angles, (S.square().sum((1, 2)) / m).sqrt(), rtol=1e-13, atol=0)
    assert not coordinates.parameter.any()


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(K=NUM_TASKS, n=st.integers(1, 8), m=SIZES, seed=SEEDS)
def test_steps_are_those_of_geotorch_with_updates_of_its_base(name: str, K: int, n: int, m: int, seed: int) -> None:
    sampler, rotations = Sampler(seed), haar(K, m, torch.float64)
    step = OptimizerStep(rotations, OPTIMIZERS[name], Processes())
    layer = nn.Module()
    layer.weight = nn.Parameter(rotations.matrices.clone())
    manifold = geotorch.SO((K, m, m), triv="cayley").double()
    nn.utils.parametrize.register_parametrization(layer, "weight", manifold)
    layer.weight = rotations.matrices.clone()
    twin: Optimizer = OPTIMIZERS[name](layer.parameters())
    for _ in range(5):
        at_heads = sampler.normal(K, n, m)
        at_heads /= at_heads.norm(dim=(1, 2), keepdim=True)
        units = at_heads @ rotations.matrices
        target = units.mean(dim=0)
        step.step([rotation_gradient(units, target)])
        twin.zero_grad()
        torch.autograd.backward(-((at_heads @ layer.weight) * target).sum())
        twin.step()
        update_base(layer, "weight")
        assert relative_error(rotations.matrices, layer.weight.detach()) <= 1e-12


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, passes=st.integers(1, 4))
def test_several_backwards_are_averaged(K: int, m: int, seed: int, passes: int) -> None:
    sampler = Sampler(seed)
    bench = Bench((4, m), K, torch.float64, rotation_optimizer=partial(SGD, lr=0.1))
    mean = torch.zeros(K, m, m).double()
    for _ in range(passes):
        grads = sampler.normal(K, 4, m)  # also those at the representation: the rotations are identities
        bench.backward(list(grads))
        units = grads / grads.norm(dim=(1, 2), keepdim=True)
        mean += coordinate_gradient(units, units.mean(dim=0), m) / passes
    bench.optimizer.step()
    S = -0.1 * (mean - mean.mT)
    expected = torch.stack([cayley_step(torch.eye(m).double(), each) for each in S])
    assert_close(bench.matrices, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_rotations_turn_in_every_step_by_the_update(name: str, K: int, m: int, seed: int) -> None:
    sampler = Sampler(seed)
    bench = Bench((4, m), K, torch.float64, rotation_optimizer=OPTIMIZERS[name])
    update = torch.zeros(K, m, m).double()  # the update of a free parameter by the same optimizer
    twin: Optimizer = OPTIMIZERS[name]([update])
    for _ in range(3):
        old = bench.matrices if bench.optimizer.rotations.size else torch.eye(m).double().expand(K, m, m)
        grads = sampler.normal(K, 4, m)
        units = grads @ old
        units = units / units.norm(dim=(1, 2), keepdim=True)
        update.grad = coordinate_gradient(units, units.mean(dim=0), m)
        update.zero_()
        twin.step()
        bench.step(list(grads))
        S = update.tril(-1) - update.tril(-1).mT
        assert relative_error(bench.matrices, torch.stack(list(map(cayley_step, old, S)))) <= 1e-12


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_momentum_does_not_turn_after_unusable_passes(K: int, m: int, seed: int) -> None:
    sampler = Sampler(seed)
    bench = Bench((4, m), K, torch.float64, rotation_optimizer=OPTIMIZERS["Adam"])
    bench.step(list(sampler.normal(K, 4, m)))
    before, alone = bench.matrices, sampler.integer(K)
    bench.step([sampler.normal(4, m) if task == alone else None for task in range(K)])
    assert_same_bits(bench.matrices, before)
    bench.step(list(sampler.normal(K, 4, m) * float("nan")))
    assert_same_bits(bench.matrices, before)


@given(m=SIZES, seed=SEEDS, log_lr=st.floats(0, 6), dtype=DTYPES)
def test_rotations_stay_rotations_under_a_reckless_optimizer(
    m: int, seed: int, log_lr: float, dtype: torch.dtype
) -> None:
    sampler = Sampler(seed, dtype)
    bench = Bench((4, m), 3, dtype, rotation_optimizer=lambda params: SGD(params, lr=10**log_lr))
    for _ in range(3):
        bench.step(list(sampler.normal(3, 4, m)))
    assert_rotations(bench.matrices)


def everywhere(params: list[nn.Parameter]) -> Optimizer:
    """Create an optimizer that also changes coordinates without a gradient, as one that adds noise does."""

    def move(*_: Any) -> None:
        for param in params:
            param.data += torch.arange(param.numel()).view_as(param) / param.numel()

    optimizer = SGD(params, lr=0.0)
    optimizer.register_step_post_hook(move)
    return optimizer


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_only_the_lower_triangle_of_an_update_counts(K: int, m: int, seed: int) -> None:
    bench = Bench((4, m), K, torch.float64, rotation_optimizer=everywhere)
    bench.step(list(Sampler(seed).normal(K, 4, m)))
    update = (torch.arange(K * m * m).view(K, m, m) / (K * m * m)).double().tril(-1)
    identity = torch.eye(m).double()
    expected = torch.stack([cayley_step(identity, S) for S in update - update.mT])
    assert relative_error(bench.matrices, expected) <= 1e-12


@pytest.mark.parametrize("make", [everywhere, *OPTIMIZERS.values()])
@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_tasks_that_are_not_rotated_stay_under_any_optimizer(make: Any, K: int, m: int, seed: int) -> None:
    sampler = Sampler(seed)
    off = sampler.integer(K)
    bench = Bench((4, m), K, torch.float64, rotation_optimizer=make, rotate=[task != off for task in range(K)])
    for _ in range(2):
        bench.step(list(sampler.normal(K, 4, m)))
    still = torch.eye(m).double()
    assert [torch.equal(matrix, still) for matrix in bench.matrices] == [task == off for task in range(K)]


def test_coordinates_of_a_task_that_is_not_rotated_have_no_gradient() -> None:
    rotations = Rotations(2, 4, rotate=[True, False], init="haar", device=torch.device("cpu"), dtype=torch.float64)
    gradient = Coordinates(rotations, Processes()).gradient([rotation_gradient(*Sampler(0).directions(2, 6, 4))])
    assert gradient.flatten(1).any(1).tolist() == [True, False]


def test_step_without_gradients_turns_by_nothing() -> None:
    rotations = haar(3, 4, torch.float64)
    before = rotations.matrices.clone()
    assert OptimizerStep(rotations, OPTIMIZERS["Adam"], Processes()).step([]) is None
    assert_same_bits(rotations.matrices, before)


def test_callable_that_returns_no_optimizer_is_an_error() -> None:
    message = (
        r"^`rotation_optimizer` must be a callable from parameters to a torch\.optim\.Optimizer, got one that returns "
        r"list\. Example: rotation_optimizer=lambda params: torch\.optim\.Adam\(params, lr=1e-4\)\.$"
    )
    make: Any = list
    with pytest.raises(TypeError, match=message):
        OptimizerStep(haar(2, 4, torch.float32), make, Processes())
