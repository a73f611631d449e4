"""Task gradients: norms, directions and sums are accurate for every finite scale."""

import math
from collections.abc import Collection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt._torch.processes import Processes
from rotoopt.weighting._gradients import JoinedGradients, TaskGradients, all_finite
from tests.asserts import assert_same_bits, eps
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, Sampler
from tests.weighting.processes import together

LENGTHS = st.integers(1, 200)
# Far beyond where a square overflows or vanishes in float32, which is from 1e19 and 1e-19 on.
SCALES = st.floats(-30, 30)
COUNTS = st.lists(st.integers(0, 9), min_size=2, max_size=3)  # samples of some processes


def measure(grads: Tensor, absent: Collection[int] = ()) -> TaskGradients:
    tasks = tuple(task for task in range(len(grads)) if task not in absent)
    present = torch.tensor([task in tasks for task in range(len(grads))])
    return TaskGradients.of(torch.where(present[:, None], grads, 0.0), tasks, present)


@st.composite
def mixed(draw: st.DrawFn) -> Tensor:
    """Draw (K, n) gradients with a different scale for each task, some of which are zero."""
    sampler = Sampler(draw(SEEDS), draw(DTYPES))
    K, n = draw(NUM_TASKS), draw(LENGTHS)
    scales = [draw(st.one_of(st.just(0.0), SCALES.map(lambda scale: 10.0**scale))) for _ in range(K)]
    return sampler.normal(K, n) * torch.tensor(scales, dtype=torch.float64).to(sampler.dtype)[:, None]


@given(grads=mixed())
def test_scaling_is_exact(grads: Tensor) -> None:
    assert_same_bits(measure(grads.clone()).rows(), grads)


@given(grads=mixed())
def test_scales_are_powers_of_two_that_bring_the_entries_below_one(grads: Tensor) -> None:
    gradients = measure(grads)
    assert (torch.frexp(gradients.scale).mantissa == 0.5).all()
    assert (gradients.scaled.abs() < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_and_smallest_numbers_are_exact_and_their_scales_are_normal_numbers(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    grads = torch.tensor([[limits.max, 0], [limits.tiny, 0], [limits.smallest_normal * limits.eps, 0]], dtype=dtype)
    gradients = measure(grads.clone())
    assert_same_bits(gradients.rows(), grads)
    for scale in (gradients.scale, 1 / gradients.scale):
        assert (scale >= torch.finfo(torch.float32).tiny).all()


def test_empty_batch_has_no_norms() -> None:
    gradients = measure(torch.empty(3, 0))
    assert torch.equal(gradients.norms, torch.zeros(3))
    assert gradients.combine(torch.ones(3)).shape == (0,)


@given(grads=mixed(), power=st.integers(-10, 10))
def test_quotients_are_those_of_the_gradients(grads: Tensor, power: int) -> None:
    gradients, expected = measure(grads.clone()).divided_by(2.0**power), measure(grads / 2.0**power)
    assert_same_bits(gradients.rows(), expected.rows())
    assert_close(gradients.norms, expected.norms, rtol=4 * eps(grads.dtype), atol=0)
    assert torch.equal(gradients.directions(), expected.directions())


@given(grads=mixed())
def test_norms_are_the_norms(grads: Tensor) -> None:
    expected = grads.double().norm(dim=1).to(grads.dtype)
    assert_close(measure(grads.clone()).norms, expected, rtol=grads.shape[1] * eps(grads.dtype), atol=0)


@given(grads=mixed(), data=st.data())
def test_gradients_are_divided_by_known_norms(grads: Tensor, data: st.DataObject) -> None:
    """Norms over several tensors: at least as large as those of the gradients here, or zero if unknown."""
    norms = grads.double().norm(dim=1) * 10 ** data.draw(st.floats(0, 3))
    norms[data.draw(st.sets(st.integers(0, len(grads) - 1)).map(list))] = 0.0
    expected = torch.where(norms > 0, 1 / norms, 0.0)[:, None] * grads.double()
    divided = measure(grads.clone()).divided(norms.to(grads.dtype))
    assert_close(divided, expected.to(grads.dtype), rtol=4 * eps(grads.dtype), atol=0)


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
    atol = 4 * len(grads) * eps(grads.dtype) * float(rows.abs().max())  # small tasks are lost next to large ones
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
def test_one_bad_entry_is_detected(bad: float, K: int, n: int, seed: int, dtype: torch.dtype) -> None:
    sampler = Sampler(seed, dtype)
    grads = sampler.normal(K, n)
    assert all_finite(measure(grads.clone()).norms)
    grads[sampler.integer(K), sampler.integer(n)] = bad
    assert not all_finite(measure(grads).norms)


@st.composite
def shares(draw: st.DrawFn) -> list[tuple[Tensor, list[int]]]:
    """Draw the gradients (K, n) of some processes, which may have no samples, and the tasks that are absent there."""
    sampler, K, sizes = Sampler(draw(SEEDS), draw(DTYPES)), draw(NUM_TASKS), draw(COUNTS)
    scales = 10 ** draw(SCALES) * sampler.log_scales(len(sizes) * K, -4, 4).view(len(sizes), K, 1)
    grads = [scale * sampler.normal(K, n) for scale, n in zip(scales, sizes, strict=True)]
    absent = [(sampler.uniform(K) < 0.3).nonzero().flatten().tolist() for _ in sizes]
    return list(zip(grads, absent, strict=True))


@given(drawn=shares())
def test_joined_gradients_are_those_of_the_joined_batch(drawn: list[tuple[Tensor, list[int]]]) -> None:
    def join(processes: Processes) -> JoinedGradients:
        grads, absent = drawn[processes.rank]
        return JoinedGradients.join(measure(grads.clone(), absent), processes)

    joined = together(len(drawn), join)
    everywhere_absent = set.intersection(*(set(absent) for _, absent in drawn))
    parts = [grads.index_fill(0, torch.tensor(absent, dtype=torch.long), 0.0) for grads, absent in drawn]
    expected = measure(torch.cat(parts, dim=1), everywhere_absent)
    dtype, weights = expected.scale.dtype, torch.ones_like(expected.scale)
    rounding = 40 * eps(dtype)  # sums over up to 27 samples
    largest = expected.norms.max()
    for each in joined:
        assert_close(each.norms, expected.norms, rtol=rounding, atol=0)
        assert_close(each.cosines, expected.cosines, rtol=0, atol=rounding)
        assert torch.equal(each.present, expected.present)
        for name in ("scale", "gram"):  # the same on all
            assert_same_bits(getattr(each, name), getattr(joined[0], name))
    combined = torch.cat([each.combine(weights) for each in joined])
    assert_close(combined, expected.combine(weights), rtol=0, atol=rounding * float(largest))
    rows = torch.cat([each.rows() for each in joined], dim=1)
    assert_close(rows, expected.rows(), rtol=0, atol=rounding * float(largest))
    directions = torch.cat([each.directions() for each in joined], dim=1)
    assert_close(directions, expected.directions(), rtol=0, atol=rounding)


@given(K=NUM_TASKS, n=LENGTHS, seed=SEEDS, scale=st.floats(-30, -25))
def test_processes_without_gradients_do_not_matter(K: int, n: int, seed: int, scale: float) -> None:
    """Even if the squares of all other gradients underflow relative to one, the scale of zeros."""
    grads = 10**scale * Sampler(seed, torch.float32).normal(K, n)

    def join(processes: Processes) -> JoinedGradients:
        return JoinedGradients.join(measure(processes.rank * grads), processes)

    expected = measure(grads.clone())
    for each in together(2, join):
        assert_same_bits(each.norms, expected.norms)
        assert_same_bits(each.cosines, expected.cosines)


def longest(rows: Tensor) -> Tensor:
    """Return the sum of the rows times their norms, which require the joined batch."""
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    return (rows * lengths).sum(0)


@given(K=NUM_TASKS, sizes=COUNTS, seed=SEEDS, dtype=DTYPES)
def test_aggregator_gets_the_joined_batch(K: int, sizes: list[int], seed: int, dtype: torch.dtype) -> None:
    whole = Sampler(seed, dtype).normal(K, sum(sizes))
    parts = torch.split(whole, sizes, dim=1)

    def aggregate(processes: Processes) -> Tensor:
        return JoinedGradients.join(measure(parts[processes.rank].clone()), processes).aggregate(longest)

    results = together(len(sizes), aggregate)
    assert [len(result) for result in results] == sizes
    # Of K products of a number and a norm, both of some units.
    assert_close(torch.cat(results), longest(whole), rtol=0, atol=1000 * eps(dtype))
