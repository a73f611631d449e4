"""Unmodified models of other libraries can be trained, and their gradients are as expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rotoopt import RotoGradOptimizer
from rotoopt.testing import check_invariants
from tests.models import actor_critic, bert, pyramid, segmentation, t5
from tests.models.case import Case, true_gradients, untied

CASES = {
    "bert, pooler shared": bert.pooler_shared,
    "bert, pooler of a task": bert.pooler_of_a_task,
    "t5": t5.generate_and_classify,
    "pyramid": pyramid.detect_and_classify,
    "segmentation": segmentation.with_auxiliary_head,
    "actor-critic": actor_critic.on_images,
}
STEPS = 30
# Another order of summation in float32, over all layers. The second one, relative to the largest gradient, is for
# gradients that are only rounding errors, such as that of a bias in front of a batch normalization.
RELATIVE, ABSOLUTE = 1e-4, 1e-6

pytestmark = pytest.mark.slow


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def wrapped(case: Case, **options: Any) -> RotoGradOptimizer:
    return RotoGradOptimizer(
        torch.optim.Adam(case.model.parameters(), lr=1e-3), heads=case.heads, **case.options, **options
    )


def back_propagate(optimizer: RotoGradOptimizer, losses: Mapping[str, Tensor], way: str) -> None:
    if way == "backward(losses)":
        optimizer.backward(losses)
    else:
        sum(losses.values()).backward()  # type: ignore[union-attr]


def test_training(case: Case) -> None:
    optimizer = wrapped(case)
    totals = []
    for _ in range(STEPS):
        losses = case.losses(case.model)
        optimizer.zero_grad()
        optimizer.step(losses)
        totals.append(sum(loss.item() for loss in losses.values()))
    assert torch.tensor(totals).isfinite().all()
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("way", ["backward(losses)", "sum(losses).backward()"])
def test_gradients(case: Case, way: str) -> None:
    """Equal to those of a copy that was never wrapped, times the weights of the tasks at shared parameters."""
    twin = untied(case.model)
    optimizer = wrapped(case, rotate=False)
    for seed in range(5):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        back_propagate(optimizer, case.losses(case.model), way)
        record = optimizer.last_step
        assert record is not None
        weights = dict(zip(optimizer.task_names, record.weights.tolist(), strict=True))
        truth = true_gradients(case, twin, weights, seed)
        largest = max(float(grad.abs().max()) for grad in truth.values())
        for name, param in case.model.named_parameters():
            expected = truth[id(param)]
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            tolerance = RELATIVE * float(expected.abs().max()) + ABSOLUTE * largest
            assert (grad - expected).abs().max() <= tolerance, name
        optimizer.step()
    assert weights != dict.fromkeys(weights, 1.0)


def test_evaluation_before_training(case: Case) -> None:
    """It computes the same as before it was wrapped, and the first step may come later."""
    case.model.eval()
    with torch.no_grad():
        before = case.losses(case.model)
        optimizer = wrapped(case)
        after = case.losses(case.model)
    torch.testing.assert_close(after, before, rtol=0.0, atol=0.0)
    case.model.train()
    optimizer.step(case.losses(case.model))


@pytest.mark.parametrize("num_steps", [0, 20])
def test_invariants(case: Case, num_steps: int) -> None:
    optimizer = wrapped(case)
    for _ in range(num_steps):
        optimizer.step(case.losses(case.model))
    check_invariants(optimizer, lambda: case.losses(case.model))


def test_ppo_learns_in_its_own_loop() -> None:
    """It sums three losses, two of them of the actor, back-propagates the sum and clips."""
    ppo = actor_critic.make_ppo()
    optimizer = RotoGradOptimizer(ppo.policy.optimizer, heads=actor_critic.heads_of(ppo.policy))
    ppo.policy.optimizer = optimizer
    before = [param.detach().clone() for param in ppo.policy.parameters()]
    ppo.learn(4 * ppo.n_steps)
    assert optimizer.last_step is not None
    assert optimizer.last_step.step == 15
    assert not any(map(torch.equal, before, ppo.policy.parameters()))
