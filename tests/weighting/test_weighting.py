"""Weightings: shares, common magnitude, GradNorm's loss, and aggregators of TorchJD as they are."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torchjd.aggregation
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, Adam
from torch.testing import assert_close

from rotoopt import EqualWeighting, GradNorm
from rotoopt.weighting import Measurements, RotoGradWeighting, gradient_shares
from rotoopt.weighting._aggregator import as_weighting
from rotoopt.weighting._gradnorm import CommonNorm, gradnorm_gradient
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


def test_tasks_that_exploded_share_among_themselves() -> None:
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
        grads[scaled] *= 2.0**power  # so that every bit of what does not change is the same
        other.step(list(grads))
        assert torch.equal(weight_shares(one), weight_shares(other))
        assert torch.equal(one.record.cosines, other.record.cosines)
        assert torch.equal(one.matrices, other.matrices)


def weight_shares(bench: Bench) -> Tensor:
    """Return the shares of the latest step, from its norms and references."""
    references = bench.state()["norm_reference.values"]
    return gradient_shares(bench.record.grad_norms / references, bench.record.present)


@given(K=NUM_TASKS, seed=SEEDS, steps=st.integers(2, 4))
def test_common_norm_is_the_shared_out_norm(K: int, seed: int, steps: int) -> None:
    sampler, bench = Sampler(seed), Bench((4, 6), K, torch.float64)
    for _ in range(steps):
        bench.step(list(sampler.normal(K, 4, 6) * sampler.log_scales(K, -1, 1)[:, None, None]))
    norms = bench.record.grad_norms
    assert_close(bench.record.weights * norms, (weight_shares(bench) @ norms).expand(K), rtol=1e-12, atol=0)


@given(K=NUM_TASKS, seed=SEEDS, scale=SCALES, data=st.data())
def test_absent_tasks_count_with_their_last_known_norms(K: int, seed: int, scale: float, data: st.DataObject) -> None:
    """A step with some of the tasks is weighed as one with all, but for tasks that no step has seen yet."""
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
    assert torch.equal(actual[unseen], torch.ones(len(unseen)).double())  # known before their first gradient is


@given(K=NUM_TASKS, seed=SEEDS, data=st.data())
def test_backbone_receives_the_weighted_sum_of_the_present(K: int, seed: int, data: st.DataObject) -> None:
    sampler, absent = Sampler(seed), data.draw(st.sets(st.sampled_from(range(K)), max_size=K - 1))
    weighting = data.draw(st.sampled_from([None, EqualWeighting(), GradNorm()]))
    bench, grads = Bench((4, 6), K, torch.float64, weighting=weighting), sampler.normal(K, 4, 6)
    received = bench.step([None if task in absent else grad for task, grad in enumerate(grads)])
    kept = [task for task in range(K) if task not in absent]
    expected = (bench.record.weights[kept, None, None] * grads[kept]).sum(dim=0)
    assert_close(received, expected, rtol=1e-12, atol=1e-12)


@given(K=NUM_TASKS, seed=SEEDS, alpha=st.floats(0, 3))
def test_gradnorm_gradient_is_that_of_its_loss(K: int, seed: int, alpha: float) -> None:
    sampler = Sampler(seed)
    J, logits, present = sampler.normal(K, 12), sampler.normal(K).requires_grad_(), sampler.uniform(K) < 0.8
    present[:2] = True
    rates = sampler.uniform(K) + 0.5
    targets = gradnorm_targets(J, logits.detach(), rates, present, alpha, "norm_of_mean")
    (expected,) = torch.autograd.grad(gradnorm_loss(J, logits, targets, present), logits)
    weights = K * logits.detach().softmax(0)
    actual = gradnorm_gradient(weights, J.norm(dim=1), targets, present)
    assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@given(K=NUM_TASKS, seed=SEEDS, dtype=DTYPES, bad=st.sampled_from([NAN, math.inf]))
def test_gradnorm_does_not_learn_from_one_task_alone_or_what_is_not_finite(
    K: int, seed: int, dtype: torch.dtype, bad: float
) -> None:
    sampler = Sampler(seed, dtype)
    norms, targets = sampler.uniform(2, K) + 0.1
    alone, everywhere = torch.arange(K) == sampler.integer(K), torch.ones(K, dtype=torch.bool)
    nothing = torch.zeros(K, dtype=dtype)
    assert gradnorm_gradient(torch.ones_like(norms), norms, targets, everywhere).any()
    assert torch.equal(gradnorm_gradient(torch.ones_like(norms), norms, targets, alone), nothing)
    norms[sampler.integer(K)] = bad
    assert torch.equal(gradnorm_gradient(torch.ones_like(norms), norms, targets, everywhere), nothing)


@pytest.mark.parametrize("common_norm", get_args(CommonNorm))
@given(K=NUM_TASKS, seed=SEEDS, alpha=st.floats(0, 3), log_spread=st.floats(-3, 0), scale=st.floats(-150, 150))
def test_gradnorm_finds_its_targets_in_what_is_measured(
    common_norm: CommonNorm, K: int, seed: int, alpha: float, log_spread: float, scale: float
) -> None:
    """Its gradient has only their signs: where tasks are almost alike, targets that are a little off show."""
    sampler, spread = Sampler(seed), 10**log_spread
    J = sampler.normal(12) + spread * sampler.normal(K, 12)
    J *= torch.where(sampler.uniform(K) < 0.3, -1.0, 1.0)[:, None]  # some are opposed
    logits, rates = (spread * sampler.normal(K)).requires_grad_(), 1 + spread * (sampler.uniform(K) - 0.5)
    present = sampler.uniform(K) < 0.8
    present[:2] = True
    targets = gradnorm_targets(J, logits.detach(), rates, present, alpha, common_norm)
    (expected,) = torch.autograd.grad(gradnorm_loss(J, logits, targets, present), logits)

    here = torch.where(present[:, None], J, 0.0)
    units = torch.nn.functional.normalize(here)
    measured = Measurements(
        norms=10**scale * here.norm(dim=1),
        present=present,
        finite=torch.tensor(True),
        losses=torch.where(present, rates, NAN),
        cosines=units @ units.mT,
        norm_references=torch.full((K,), NAN),
        loss_references=torch.ones(K),
    )
    actual = GradNorm(alpha, common_norm=common_norm).gradient(logits.detach(), measured)
    assert_close(actual / 10**scale, expected, rtol=1e-9, atol=1e-11)
    assert GradNorm().gradient(logits.detach().float(), measured).dtype == torch.float32


@given(K=NUM_TASKS, seed=SEEDS, log_spread=st.floats(-3, 0), scale=st.floats(-150, 150))
def test_norm_of_the_mean_is_small_where_tasks_conflict(K: int, seed: int, log_spread: float, scale: float) -> None:
    sampler = Sampler(seed)
    J = sampler.normal(12) + 10**log_spread * sampler.normal(K, 12)
    J[::2] *= -1.0
    units = torch.nn.functional.normalize(J)
    norm = GradNorm()._norm(10**scale * J.norm(dim=1), units @ units.mT) / 10**scale
    largest = float(J.norm(dim=1).max())
    # Of squares that cancel: a root of some K^2 eps, next to the largest norm.
    assert_close(norm, J.sum(0).norm(), rtol=1e-9, atol=K * eps(torch.float64) ** 0.5 * largest)


def gradnorm_targets(
    J: Tensor, logits: Tensor, rates: Tensor, present: Tensor, alpha: float, common_norm: CommonNorm
) -> Tensor:
    weighted = ((len(J) * logits.softmax(0))[:, None] * J)[present]
    length: Tensor = weighted.mean(dim=0).norm() if common_norm == "norm_of_mean" else weighted.norm(dim=1).mean()
    return length * (rates / rates[present].mean()) ** alpha


def gradnorm_loss(J: Tensor, logits: Tensor, targets: Tensor, present: Tensor) -> Tensor:
    norms: Tensor = len(J) * logits.softmax(0) * J.norm(dim=1)
    return (norms - targets)[present].abs().sum()


@pytest.mark.parametrize("common_norm", get_args(CommonNorm))
@given(K=NUM_TASKS, seed=SEEDS, alpha=st.floats(0, 3), absent=st.integers(0, 9))
def test_small_gradnorm_step_lowers_its_loss(
    common_norm: CommonNorm, K: int, seed: int, alpha: float, absent: int
) -> None:
    sampler = Sampler(seed)
    J, rates, values = sampler.normal(K, 12), sampler.uniform(K) + 0.5, [1.0] * K
    gradnorm = GradNorm(alpha, optimizer=lambda params: SGD(params, lr=1e-6), common_norm=common_norm)
    bench = Bench((12,), K, torch.float64, weighting=gradnorm, rotate=False)
    bench.step(list(J), values)  # loss references: one
    present = torch.tensor([K == 2 or task != absent for task in range(K)])
    before = gradnorm.logits.detach().clone()
    targets = gradnorm_targets(J, before, rates, present, alpha, common_norm)
    bench.step([grad if here else None for grad, here in zip(J, present, strict=True)], rates.tolist())
    after = gradnorm.logits.detach().clone()
    losses = [gradnorm_loss(J, logits, targets, present) for logits in (before, after)]
    assert losses[1] < losses[0]


@given(K=NUM_TASKS, seed=SEEDS, lr=st.floats(-3, 1), scale=SCALES, dtype=DTYPES)
def test_gradnorm_weights_are_positive_and_sum_to_the_number_of_tasks(
    K: int, seed: int, lr: float, scale: float, dtype: torch.dtype
) -> None:
    sampler, gradnorm = Sampler(seed, dtype), GradNorm(lr=10**lr)
    bench = Bench((4, 6), K, dtype, weighting=gradnorm)
    for _ in range(5):
        bench.step(list(10**scale * sampler.normal(K, 4, 6)), sampler.uniform(K).tolist())
        assert (gradnorm.weights > 0).all()
        assert_close(gradnorm.weights.sum(), torch.tensor(float(K), dtype=gradnorm.weights.dtype))


@pytest.mark.parametrize("common_norm", get_args(CommonNorm))
@given(K=NUM_TASKS, seed=SEEDS)
def test_gradnorm_is_the_same_where_rotations_rest(common_norm: CommonNorm, K: int, seed: int) -> None:
    weights = []
    for turn_every in (1, 10**9):
        sampler, gradnorm = Sampler(seed), GradNorm(common_norm=common_norm)
        bench = Bench((4, 6), K, torch.float64, weighting=gradnorm, rotate=False, turn_every=turn_every)
        for _ in range(4):
            bench.step(list(sampler.normal(K, 4, 6)), sampler.uniform(K).tolist())
        weights.append(gradnorm.weights)
    assert_close(weights[1], weights[0], rtol=1e-12, atol=0)


def test_gradnorm_is_trained_by_adam_where_the_representation_is() -> None:
    assert repr(GradNorm()) == "GradNorm(alpha=1.5)"
    for gradnorm, lr in ((GradNorm(), 0.025), (GradNorm(lr=0.5), 0.5)):
        gradnorm.bind(3, torch.device("meta"), torch.float64)
        assert isinstance(gradnorm.optimizer, Adam)
        assert gradnorm.optimizer.param_groups[0]["lr"] == lr
        assert gradnorm.optimizer.param_groups[0]["params"] == [gradnorm.logits]
        assert (gradnorm.logits.device.type, gradnorm.logits.dtype) == ("meta", torch.float64)


def test_gradnorm_asks_for_a_norm_that_it_knows_and_for_an_optimizer() -> None:
    unknown: Any = "mean"
    message = r"^`common_norm` must be one of \('norm_of_mean', 'mean_of_norms'\), got 'mean'\.$"
    with pytest.raises(ValueError, match=message):
        GradNorm(common_norm=unknown)
    message = (
        r"^GradNorm must belong to an optimizer before its weights are read or trained, got one that does not\. "
        r"Pass it to RotoGradOptimizer\(\.\.\., weighting=\.\.\.\) first\.$"
    )
    with pytest.raises(RuntimeError, match=message):
        _ = GradNorm().weights


@given(seed=SEEDS)
def test_gradnorm_uses_the_weights_before_their_update(seed: int) -> None:
    gradnorm, sampler = GradNorm(lr=0.1), Sampler(seed)
    bench = Bench((4, 6), 3, torch.float64, weighting=gradnorm)
    bench.step(list(sampler.normal(3, 4, 6)))
    assert torch.equal(bench.optimizer.task_weights, torch.ones(3).double())
    assert (gradnorm.weights != 1).any()


AGGREGATORS = ["UPGrad", "IMTLG", "AlignedMTL", "PCGrad", "ConFIG", "MGDA", "Mean"]


@pytest.mark.parametrize("name", AGGREGATORS)
@given(K=NUM_TASKS, layout=LAYOUT, seed=SEEDS, dtype=DTYPES, absent=st.none() | st.integers(0, 9))
def test_torchjd_aggregator_gets_the_gradients_of_the_present_tasks(
    name: str, K: int, layout: Layout, seed: int, dtype: torch.dtype, absent: int | None
) -> None:
    shape, dim = layout
    aggregator: Callable[[Tensor], Tensor] = getattr(torchjd.aggregation, name)()
    bench, grads = Bench(shape, K, dtype, dim=dim, weighting=aggregator), Sampler(seed, dtype).normal(K, *shape)
    kept = [task for task in range(K) if task != absent]
    torch.manual_seed(seed)  # PCGrad visits the tasks in random order
    received = bench.step([grads[task] if task in kept else None for task in range(K)])
    torch.manual_seed(seed)
    assert torch.equal(received, aggregator(grads[kept].flatten(1)).view(shape))


@given(K=NUM_TASKS, seed=SEEDS)
def test_weights_of_a_callable_are_unknown(K: int, seed: int) -> None:
    bench = Bench((4, 6), K, torch.float32, weighting=lambda J: J.sum(dim=0))
    bench.step(list(Sampler(seed, torch.float32).normal(K, 4, 6)))
    assert bench.record.weights.isnan().all()


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


@pytest.mark.parametrize(
    ("weighting", "found"),
    [
        (lambda J: J, r"\(2, 24\)"),
        (lambda J: J.sum(), r"\(\)"),
        (lambda J: None, "NoneType"),
        (lambda J: [1.0], "list"),
    ],
)
def test_callable_that_returns_something_else_is_an_error(weighting: Callable[[Tensor], Any], found: str) -> None:
    bench = Bench((4, 6), 2, torch.float32, weighting=weighting)
    message = rf"^`weighting` must map a \(K, n\) tensor to an \(n,\) tensor, got {found} for \(2, 24\)\.$"
    with pytest.raises(ValueError, match=message):
        bench.step(list(Sampler(0, torch.float32).normal(2, 4, 6)))


def test_weight_of_a_zero_gradient_is_zero_and_that_of_a_unit_gradient_is_not() -> None:
    bench = Bench((4, 6), 3, torch.float64)
    unit = torch.zeros(4, 6, dtype=torch.float64)
    unit[0, 0] = 1.0
    bench.step([unit, 0 * unit, 4 * unit])
    # The common norm is 5 / 3, with equal shares: a task without a reference gets the mean of the others.
    assert_close(bench.record.weights, torch.tensor([5 / 3, 0.0, 5 / 12], dtype=torch.float64))


def test_weightings_are_shown_with_their_names() -> None:
    assert repr(EqualWeighting()) == "EqualWeighting()"


def test_a_callable_is_shown_as_itself() -> None:
    aggregator = torchjd.aggregation.Mean()
    assert repr(as_weighting(aggregator)) == repr(aggregator)
