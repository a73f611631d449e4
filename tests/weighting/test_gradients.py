"""Task gradients: norms, directions and sums that are right for every finite scale."""

import math
from collections.abc import Collection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt.weighting._gradients import TaskGradients
from tests.asserts import assert_same_bits, eps
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, Sampler

LENGTHS = st.integers(1, 200)
# Far beyond where a square overflows or vanishes in float32, which is from 1e19 and 1e-19 on.
SCALES = st.floats(-30, 30)


def measure(grads: Tensor, absent: Collection[int] = ()) -> TaskGradients:
    tasks = tuple(task for task in range(len(grads)) if task not in absent)
    present = torch.tensor([task in tasks for task in range(len(grads))])
    return TaskGradients.of(torch.where(present[:, None], grads, 0.0), tasks, present)


@st.composite
def mixed(draw: st.DrawFn) -> Tensor:
    """Draw (K, n) gradients whose tasks have scales of their own, and some of which are zero."""
    sampler = Sampler(draw(SEEDS), draw(DTYPES))
    K, n = draw(NUM_TASKS), draw(LENGTHS)
    scales = [draw(st.one_of(st.just(0.0), SCALES.map(lambda scale: 10.0**scale))) for _ in range(K)]
    return sampler.normal(K, n) * torch.tensor(scales, dtype=torch.float64).to(sampler.dtype)[:, None]


@given(grads=mixed())
def test_scaling_loses_no_bit(grads: Tensor) -> None:
    assert_same_bits(measure(grads.clone()).rows(), grads)


@given(grads=mixed())
def test_scales_are_powers_of_two_that_bring_the_entries_below_one(grads: Tensor) -> None:
    gradients = measure(grads)
    assert (torch.frexp(gradients.scale).mantissa == 0.5).all()
    assert (gradients.scaled.abs() < 1).all()


@given(grads=mixed())
def test_norms_are_the_norms(grads: Tensor) -> None:
    expected = grads.double().norm(dim=1).to(grads.dtype)
    assert_close(measure(grads.clone()).norms, expected, rtol=grads.shape[1] * eps(grads.dtype), atol=0)


@given(grads=mixed())
def test_directions_have_length_one_or_zero(grads: Tensor) -> None:
    lengths = measure(grads.clone()).directions().double().norm(dim=1)
    expected = (grads != 0).any(dim=1).double()
    assert_close(lengths, expected, rtol=0, atol=(4 + grads.shape[1]) * eps(grads.dtype))


@given(grads=mixed())
def test_cosines_are_the_inner_products_of_the_directions(grads: Tensor) -> None:
    rows = grads.double()
    units = torch.nan_to_num(rows / rows.norm(dim=1, keepdim=True)).to(grads.dtype)
    atol = (4 + grads.shape[1]) * eps(grads.dtype)
    assert_close(measure(grads).cosines, units @ units.mT, rtol=0, atol=atol)


@given(grads=mixed(), seed=SEEDS)
def test_combination_is_the_weighted_sum(grads: Tensor, seed: int) -> None:
    weights = Sampler(seed, grads.dtype).uniform(len(grads))
    rows = weights.double()[:, None] * grads.double()
    atol = 4 * len(grads) * eps(grads.dtype) * float(rows.abs().max())  # small tasks drown in large ones
    assert_close(measure(grads).combine(weights), rows.sum(dim=0).to(grads.dtype), rtol=0, atol=atol)


@given(grads=mixed(), data=st.data())
def test_absent_tasks_have_no_row_and_no_norm(grads: Tensor, data: st.DataObject) -> None:
    absent = data.draw(st.sets(st.sampled_from(range(len(grads))), max_size=len(grads) - 1))
    gradients = measure(grads.clone(), absent)
    kept = [task for task in range(len(grads)) if task not in absent]
    assert torch.equal(gradients.rows(), grads[kept])
    assert (gradients.norms[list(absent)] == 0).all()


@given(K=NUM_TASKS, n=LENGTHS, seed=SEEDS, dtype=DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_is_seen(bad: float, K: int, n: int, seed: int, dtype: torch.dtype) -> None:
    sampler = Sampler(seed, dtype)
    grads = sampler.normal(K, n)
    assert measure(grads.clone()).finite
    grads[sampler.integer(K), sampler.integer(n)] = bad
    assert not measure(grads).finite
