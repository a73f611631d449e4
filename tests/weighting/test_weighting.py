"""Weightings: shares, common magnitude, equal weights, and what all of them have in common."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt import EqualWeighting, GradNorm
from rotoopt.weighting import Measurements, RotoGradWeighting, gradient_shares
from tests.asserts import eps
from tests.oracle import shares
from tests.samplers import DTYPES, LAYOUTS, NUM_TASKS, SEEDS, Bench, Layout, Sampler

SCALES = st.floats(-30, 30)
LAYOUT = st.sampled_from(LAYOUTS)
NAN = math.nan


@st.composite
def ratios(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw norms over references, some unknown, some zero, and which tasks are present (at least one)."""
    sampler, K = Sampler(draw(SEEDS)), draw(NUM_TASKS)
    values = sampler.uniform(K) * 10 ** draw(SCALES)
    values = torch.where(sampler.uniform(K) < 0.2, 0.0, values)
    values = torch.where(sampler.uniform(K) < 0.3, NAN, values)
    present = sampler.uniform(K) < 0.7
    present[sampler.integer(K)] = True
    return values, present


@given(drawn=ratios())
def test_shares_are_a_convex_combination_of_the_present_tasks(drawn: tuple[Tensor, Tensor]) -> None:
    norm_ratios, present = drawn
    alphas = gradient_shares(norm_ratios, present)
    assert (alphas >= 0).all()
    assert (alphas[~present] == 0).all()
    assert_close(alphas.sum(), torch.ones(()).double(), rtol=0, atol=len(alphas) * eps(torch.float64))


@given(drawn=ratios())
def test_shares_are_those_of_the_paper(drawn: tuple[Tensor, Tensor]) -> None:
    norm_ratios, present = drawn
    ones = torch.where(norm_ratios.isnan(), NAN, 1.0)
    expected = shares(norm_ratios.nan_to_num(1.0)[present], ones[present])
    assert_close(gradient_shares(norm_ratios, present)[present], expected, rtol=1e-12, atol=0)


def test_shares_of_tasks_with_exploding_gradients() -> None:
    # Gradients of 1e30 after references of 1e-30: their ratios are infinite in float32.
    alphas = gradient_shares(torch.tensor([1.0, math.inf, math.inf]), torch.tensor([True, True, True]))
    assert_close(alphas, torch.tensor([0.0, 0.5, 0.5]))


def test_tasks_without_any_gradient_share_equally() -> None:
    alphas = gradient_shares(torch.zeros(4).double(), torch.tensor([True, False, True, True]))
    assert torch.equal(alphas, torch.tensor([1.0, 0.0, 1.0, 1.0]).double() / 3)


def test_only_task_with_a_gradient_gets_the_whole_share() -> None:
    alphas = gradient_shares(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([True, True, True]))
    assert torch.equal(alphas, torch.tensor([0.0, 1.0, 0.0]))


@given(K=NUM_TASKS, layout=LAYOUT, seed=SEEDS, low=st.floats(-2, 0), high=st.floats(0, 3), dtype=DTYPES)
def test_scaled_gradients_share_one_norm_between_the_least_and_the_largest(
    K: int, layout: Layout, seed: int, low: float, high: float, dtype: torch.dtype
) -> None:
    shape, dim = layout
    sampler, bench = Sampler(seed, dtype), Bench(shape, K, dtype, dim=dim)
    for _ in range(3):
        grads = sampler.normal(K, *shape) * sampler.log_scales(K, low, high).view(K, *[1] * len(shape))
        bench.step(list(grads))
        norms = bench.record.grad_norms
        scaled = bench.record.weights * norms
        rtol = 10 * eps(dtype)
        assert_close(scaled, scaled.mean().expand(K), rtol=rtol, atol=0)
        assert norms.min() * (1 - rtol) <= scaled.mean() <= norms.max() * (1 + rtol)


@given(K=NUM_TASKS, layout=LAYOUT, seed=SEEDS, power=st.integers(-40, 40), dtype=DTYPES)
def test_scale_of_a_loss_changes_neither_shares_nor_directions(
    K: int, layout: Layout, seed: int, power: int, dtype: torch.dtype
) -> None:
    shape, dim = layout
    sampler, scaled = Sampler(seed, dtype), Sampler(seed).integer(K)
    one, other = (Bench(shape, K, dtype, dim=dim) for _ in range(2))
    for _ in range(4):
        grads = sampler.normal(K, *shape)
        one.step(list(grads))
        grads[scaled] *= 2.0**power  # so that unchanged values are bit-identical
        other.step(list(grads))
        assert torch.equal(weight_shares(one), weight_shares(other))
        assert torch.equal(one.record.cosines, other.record.cosines)
        assert torch.equal(one.matrices, other.matrices)


def weight_shares(bench: Bench) -> Tensor:
    """Return the shares of the latest step, from its norms and references."""
    references = bench.state()["norm_reference.values"]
    return gradient_shares(bench.record.grad_norms / references, bench.record.present)


@given(K=NUM_TASKS, seed=SEEDS, steps=st.integers(2, 4))
def test_common_norm_is_the_weighted_mean_of_the_norms(K: int, seed: int, steps: int) -> None:
    sampler, bench = Sampler(seed), Bench((4, 6), K, torch.float64)
    for _ in range(steps):
        bench.step(list(sampler.normal(K, 4, 6) * sampler.log_scales(K, -1, 1)[:, None, None]))
    norms = bench.record.grad_norms
    assert_close(bench.record.weights * norms, (weight_shares(bench) @ norms).expand(K), rtol=1e-12, atol=0)


@given(K=NUM_TASKS, seed=SEEDS, scale=SCALES, data=st.data())
def test_absent_tasks_count_with_their_last_known_norms(K: int, seed: int, scale: float, data: st.DataObject) -> None:
    """A step with some tasks is weighted like one with all, except for tasks that have not been present yet."""
    sampler = Sampler(seed)
    norms, references = 10**scale * sampler.log_scales(2 * K, -3, 3).view(2, K)
    seen = data.draw(st.sets(st.integers(0, K - 1), min_size=1).map(sorted))
    unseen = [task for task in range(K) if task not in seen]
    norms[unseen], references[unseen] = 0.0, NAN

    def weights(tasks: set[int], among: list[int]) -> Tensor:
        present = torch.tensor([task in tasks for task in among])
        measured = Measurements(
            norms[among], present, torch.tensor(True), None, None, references[among], torch.full((len(among),), NAN)
        )
        return RotoGradWeighting()(measured)

    expected = weights(set(seen), seen)
    actual = weights(data.draw(st.sets(st.sampled_from(seen))), list(range(K)))
    assert_close(actual[seen], expected, rtol=1e-12, atol=0)
    assert torch.equal(actual[unseen], torch.ones(len(unseen)).double())  # known before their first gradient


@given(K=NUM_TASKS, seed=SEEDS, data=st.data())
def test_backbone_receives_the_weighted_sum_of_the_present(K: int, seed: int, data: st.DataObject) -> None:
    sampler, absent = Sampler(seed), data.draw(st.sets(st.sampled_from(range(K)), max_size=K - 1))
    weighting = data.draw(st.sampled_from([None, EqualWeighting(), GradNorm()]))
    bench, grads = Bench((4, 6), K, torch.float64, weighting=weighting), sampler.normal(K, 4, 6)
    received = bench.step([None if task in absent else grad for task, grad in enumerate(grads)])
    kept = [task for task in range(K) if task not in absent]
    expected = (bench.record.weights[kept, None, None] * grads[kept]).sum(dim=0)
    assert_close(received, expected, rtol=1e-12, atol=1e-12)


@given(K=NUM_TASKS, seed=SEEDS, dtype=DTYPES, data=st.data())
def test_equal_weights_are_one_for_every_task_that_is_present(
    K: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    present = data.draw(st.sets(st.integers(0, K - 1), min_size=1))
    bench = Bench((4, 6), K, dtype, weighting=EqualWeighting())
    grads = Sampler(seed, dtype).normal(K, 4, 6)
    received = bench.step([grads[task] if task in present else None for task in range(K)])
    assert_close(received, grads[sorted(present)].sum(dim=0), rtol=100 * K * eps(dtype), atol=100 * K * eps(dtype))
    assert_close(bench.record.weights, torch.tensor([float(task in present) for task in range(K)], dtype=dtype))


def test_weight_of_a_zero_gradient_is_zero_and_that_of_a_unit_gradient_is_not() -> None:
    bench = Bench((4, 6), 3, torch.float64)
    unit = torch.zeros(4, 6, dtype=torch.float64)
    unit[0, 0] = 1.0
    bench.step([unit, 0 * unit, 4 * unit])
    # The common norm is 5 / 3, with equal shares: a task without a reference gets the mean of the others.
    assert_close(bench.record.weights, torch.tensor([5 / 3, 0.0, 5 / 12], dtype=torch.float64))


def test_reprs_of_weightings() -> None:
    assert repr(EqualWeighting()) == "EqualWeighting()"
