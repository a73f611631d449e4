"""GradNorm: the gradient of its loss, its targets, and its trained weights."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, Adam
from torch.testing import assert_close

from rotoopt import GradNorm
from rotoopt.weighting import Measurements
from rotoopt.weighting._gradnorm import CommonNorm, gradnorm_gradient
from tests.asserts import eps
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, Bench, Sampler

SCALES = st.floats(-30, 30)
NAN = math.nan


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
def test_gradnorm_is_not_updated_by_a_single_task_or_non_finite_values(
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
def test_gradnorm_computes_its_targets_from_measurements(
    common_norm: CommonNorm, K: int, seed: int, alpha: float, log_spread: float, scale: float
) -> None:
    """Its gradient depends on signs only: for almost equal tasks, it shows small errors of the targets."""
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
def test_gradnorm_does_not_depend_on_updates_of_the_rotations(common_norm: CommonNorm, K: int, seed: int) -> None:
    weights = []
    for turn_every in (1, 10**9):
        sampler, gradnorm = Sampler(seed), GradNorm(common_norm=common_norm)
        bench = Bench((4, 6), K, torch.float64, weighting=gradnorm, rotate=False, turn_every=turn_every)
        for _ in range(4):
            bench.step(list(sampler.normal(K, 4, 6)), sampler.uniform(K).tolist())
        weights.append(gradnorm.weights)
    assert_close(weights[1], weights[0], rtol=1e-12, atol=0)


def test_gradnorm_is_trained_by_adam_on_the_device_of_the_representation() -> None:
    assert repr(GradNorm()) == "GradNorm(alpha=1.5)"
    for gradnorm, lr in ((GradNorm(), 0.025), (GradNorm(lr=0.5), 0.5)):
        gradnorm.bind(3, torch.device("meta"), torch.float64)
        assert isinstance(gradnorm.optimizer, Adam)
        assert gradnorm.optimizer.param_groups[0]["lr"] == lr
        assert gradnorm.optimizer.param_groups[0]["params"] == [gradnorm.logits]
        assert (gradnorm.logits.device.type, gradnorm.logits.dtype) == ("meta", torch.float64)


def test_gradnorm_rejects_unknown_norms_and_missing_optimizers() -> None:
    unknown: Any = "mean"
    message = r"^`common_norm` must be one of \('norm_of_mean', 'mean_of_norms'\), got 'mean'\.$"
    with pytest.raises(ValueError, match=message):
        GradNorm(common_norm=unknown)
    message = (
        r"^GradNorm must belong to an optimizer before its weights are read or trained, got one without an "
        r"optimizer\. Pass it to RotoGradOptimizer\(\.\.\., weighting=\.\.\.\) first\.$"
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
