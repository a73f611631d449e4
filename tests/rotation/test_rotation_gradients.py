"""Gradients of the rotations: sums over the samples of a batch, its parts, and all processes."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt._capture.representation import RotatedDims
from rotoopt._rotation import cayley_step
from rotoopt._rotation.step import RotationGradient, any_usable
from rotoopt._torch.processes import Processes
from tests.asserts import assert_same_bits
from tests.oracle import layout
from tests.rotation.steps import turned
from tests.samplers import DTYPES, LAYOUTS, NUM_SAMPLES, NUM_TASKS, SEEDS, SIZES, Layout, Sampler, rotation_gradient
from tests.weighting.processes import together


@given(K=NUM_TASKS, m=SIZES, counts=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=SEEDS)
def test_gradients_of_the_parts_of_a_batch_add_up(K: int, m: int, counts: list[int], seed: int) -> None:
    """Also if one part would use the low-rank form, and all together the dense one."""
    sampler = Sampler(seed)
    R, (units, target) = sampler.rotations(K, m), sampler.directions(K, sum(counts), m)
    z = sampler.normal(sum(counts), m)
    parts = zip(*(torch.split(each, counts, dim=-2) for each in (units, target, z)), strict=True)
    expected = turned(R, rotation_gradient(units, target, z))
    assert_close(turned(R, *(rotation_gradient(*part) for part in parts)), expected, rtol=0, atol=1e-12)


@given(K=NUM_TASKS, m=SIZES, counts=st.lists(st.integers(1, 4), min_size=2, max_size=3), seed=SEEDS)
def test_processes_use_the_gradients_of_their_joined_batch(K: int, m: int, counts: list[int], seed: int) -> None:
    sampler = Sampler(seed)
    R, (units, target) = sampler.rotations(K, m), sampler.directions(K, sum(counts), m)
    z = sampler.normal(sum(counts), m)
    expected = turned(R, rotation_gradient(units, target, z))
    shares = list(zip(*(torch.split(each, counts, dim=-2) for each in (units, target, z)), strict=True))

    def turn(processes: Processes) -> Tensor:
        return turned(R, rotation_gradient(*shares[processes.rank]), processes=processes)

    results = together(len(counts), turn)
    assert_close(results[0], expected, rtol=0, atol=1e-12)
    for result in results:
        assert_same_bits(result, results[0])


def test_positions_of_a_map_count_as_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cayley_step, "SampleSkew", None)  # 12 samples of 16 features: the dense form is cheaper
    units, target = Sampler(0).directions(2, 3, 16, 4)
    turned(Sampler(1).rotations(2, 16), rotation_gradient(units, target, dim=1))


@given(layout_=st.sampled_from(LAYOUTS), seed=SEEDS, K=st.integers(1, 4), rest=st.integers(0, 3))
def test_correlation_is_a_sum_over_samples(layout_: Layout, seed: int, K: int, rest: int) -> None:
    shape, dim = layout_
    sampler, dims = Sampler(seed), RotatedDims(dim)
    x, y = sampler.normal(K, *shape), sampler.normal(*shape)
    m = dims.size(y.shape) - rest
    index = layout(y.shape, dims.dim)[:, :m]
    expected = torch.stack([rep.flatten()[index].T @ y.flatten()[index] for rep in x])
    gradient = RotationGradient(dims.view_stacked(x), dims.view(y), torch.tensor(True))
    assert_close(gradient.correlation(m), expected, rtol=1e-13, atol=1e-13)
    assert gradient.num_samples == len(index)


@given(K=NUM_TASKS, n=NUM_SAMPLES, m=SIZES, seed=SEEDS, dtype=DTYPES, dense=st.sampled_from([0.0, math.inf]))
def test_the_gradient_of_no_samples_changes_nothing(
    K: int, n: int, m: int, seed: int, dtype: torch.dtype, dense: float
) -> None:
    """As in a process without samples that updates its rotations because others do."""
    sampler = Sampler(seed, dtype)
    R, gradients = sampler.rotations(K, m), rotation_gradient(*sampler.directions(K, n, m))
    none = RotationGradient.none(K, m, like=R[:, 0, 0])
    assert none.num_samples == 0
    assert_same_bits(none.correlation(m), torch.zeros(K, m, m, dtype=dtype))
    assert_close(none.usable, torch.tensor(False))
    assert torch.equal(turned(R, gradients, none, dense_from=dense), turned(R, gradients, dense_from=dense))
    assert_same_bits(turned(R, none, dense_from=dense), R)


@pytest.mark.parametrize("usable", [(False, True), (False, False, True), (False, False)])
def test_a_gradient_that_is_usable_on_one_process_is_usable_on_all(usable: tuple[bool, ...]) -> None:
    def found(processes: Processes) -> bool:
        empty = RotationGradient.none(1, 4, like=torch.ones(1))
        own = replace(empty, usable=torch.tensor(usable[processes.rank]))
        return bool(any_usable([empty, own], processes))

    assert together(len(usable), found) == [any(usable)] * len(usable)


def test_the_gradient_of_an_empty_batch_is_zero() -> None:
    empty = RotationGradient.none(1, 4, like=torch.ones(1, dtype=torch.float64))
    assert empty.num_samples == 0
    assert torch.equal(empty.correlation(3), torch.zeros(1, 3, 3, dtype=torch.float64))
