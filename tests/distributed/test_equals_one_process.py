"""Two ranks with half of the batch each equal one process with the whole batch."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks import Ranks
from tests.distributed.training import ALONE, OPTIONS, PLANS, Result, Setup, train

pytestmark = pytest.mark.distributed

# Rounding errors: sums over the batch have another order. Measured after 35 steps: 2e-7 and 5e-16.
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}


def assert_equal(actual: Result, expected: Result, bound: float) -> None:
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0.0, atol=bound)
    # Weights may be large, and s = 1 - 1 / F has 1 / (F - 1) times the relative error of F, up to 9 times.
    torch.testing.assert_close(actual[2], expected[2], rtol=2 * bound, atol=0.0, equal_nan=True)


def check(ranks: Ranks, setup: Setup) -> None:
    first, second = ranks.run(train, setup)
    assert_equal(first, second, 0.0)
    expected = train(None, setup)
    assert_equal(first, expected, BOUNDS[setup.dtype])
    turns = setup.options != "rotate=False" and setup.plan not in ALONE
    assert turns != torch.equal(expected[1], torch.eye(expected[1].shape[-1]).expand_as(expected[1]))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option(ranks: Ranks, options: str, dtype: torch.dtype) -> None:
    check(ranks, Setup(options, dtype=dtype))


@pytest.mark.parametrize("wrapper", ["find_unused_parameters", "static_graph"])
def test_every_way_to_wrap(ranks: Ranks, wrapper: str) -> None:
    check(ranks, Setup(wrapper=wrapper))


@pytest.mark.parametrize("options", OPTIONS)
def test_task_absent_on_one_rank(ranks: Ranks, options: str) -> None:
    check(ranks, Setup(options, wrapper="find_unused_parameters", plan="one absent on a rank"))


@pytest.mark.parametrize("own", [False, True], ids=["backward(losses)", "sum(losses).backward()"])
@pytest.mark.parametrize("options", ["default", "every second step", "RotoGradWeighting", "rotate=False"])
@pytest.mark.parametrize("plan", PLANS)
def test_whatever_a_batch_holds(ranks: Ranks, plan: str, options: str, own: bool) -> None:
    check(ranks, Setup(options, wrapper="find_unused_parameters", plan=plan, own=own, dtype=torch.float64))


@pytest.mark.parametrize("options", ["default", "RotoGradWeighting"])
@pytest.mark.parametrize("plan", ["one left on a rank", "one absent on each rank in turn", "others in each pass"])
def test_own_backward_with_many_collectives(ranks: Ranks, plan: str, options: str) -> None:
    """Those of the heads begin at different times if a rank lacks some tasks."""
    check(ranks, Setup(options, wrapper="a bucket for each parameter", plan=plan, own=True, dtype=torch.float64))


@pytest.mark.parametrize("plan", sorted(PLANS.keys() - ALONE))  # Adam would enlarge rounding errors
def test_rotation_optimizer_whatever_a_batch_holds(ranks: Ranks, plan: str) -> None:
    check(ranks, Setup("Adam", wrapper="find_unused_parameters", plan=plan))


@pytest.mark.parametrize("plan", ["all", "one absent on a rank", "one absent on both", "accumulation"])
def test_heads_at_two_depths(ranks: Ranks, plan: str) -> None:
    check(ranks, Setup("every second step", wrapper="find_unused_parameters", plan=plan, deep=True))


@pytest.mark.parametrize("options", ["default", "EqualWeighting, as it ships", "GradNorm", "UPGrad"])
def test_accumulation_without_synchronization(ranks: Ranks, options: str) -> None:
    check(ranks, Setup(options, plan="accumulation"))


@pytest.mark.parametrize("options", ["default", "GradNorm", "UPGrad"])
def test_batches_of_different_sizes(ranks: Ranks, options: str) -> None:
    check(ranks, Setup(options, sizes=(3, 5)))


@pytest.mark.parametrize("options", ["default", "GradNorm", "normalize_losses"])
def test_grad_scaler(ranks: Ranks, options: str) -> None:
    check(ranks, Setup(options, scaled=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_fully_shard(ranks: Ranks, options: str) -> None:
    sharded, other = ranks.run(train, Setup(options, wrapper="fsdp"))
    assert_equal(sharded, other, 0.0)
    assert_equal(sharded, ranks.run(train, Setup(options))[0], 1e-6)
