"""Each check passes where all is well, leaves everything as it was, and finds the fault that it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer, testing
from rotoopt.testing import check_invariants
from tests.contract.models import TwoTasks, adam, assert_same, snapshot, train, wrap

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "EqualWeighting": lambda: {"weighting": EqualWeighting()},
    "GradNorm": lambda: {"weighting": GradNorm()},
    "callable": lambda: {"weighting": lambda grads: grads.sum(0)},
    "normalize_losses": lambda: {"normalize_losses": True},
    "rotation_size": lambda: {"rotation_size": 5, "init": "haar"},
    "rotate": lambda: {"rotate": [False, True]},
    "Adam": lambda: {"rotation_optimizer": partial(Adam, lr=0.1)},
}


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_good_model_passes_and_stays_as_it_was(options: str, num_steps: int) -> None:
    model, optimizer = wrap(adam, **OPTIONS[options]())
    train(model, optimizer, *range(num_steps))
    before, record = snapshot(model, optimizer), optimizer.last_step
    check_invariants(optimizer, lambda: model.losses(7)[0])
    assert_same(snapshot(model, optimizer), before)
    assert optimizer.last_step is record
    train(model, optimizer, 8)  # and can be trained on


def test_functional_heads_and_dropout_and_absent_tasks() -> None:
    model, optimizer = wrap(adam, num_tasks=2, rotation_size=6)
    dropout = nn.Dropout(0.5)

    def losses() -> list[Tensor | None]:
        left, _ = model.losses(0, lambda rep: [dropout(each) for each in optimizer.rotate(rep)])[0]
        return [left, None]

    check_invariants(optimizer, losses)


LossesOf = Callable[[TwoTasks, RotoGradOptimizer], Sequence[Tensor]]


def outputs(model: TwoTasks) -> tuple[list[Tensor], Tensor]:
    rep = model.backbone(model.inputs(0))
    return [head(rep) for head in model.heads.values()], rep


def swapped(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    return model.losses(0)[0][::-1]


def bypassed(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    rep = model.backbone(model.inputs(0))
    left, right = model.heads.values()
    return [left(rep).square().mean(), right.forward(rep).square().mean()]


def of_another_head(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    (left, right), _ = outputs(model)
    return [left.square().mean(), right.square().mean() + left.square().mean()]


def of_the_norm(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    (left, _), rep = outputs(model)
    right = optimizer._core.capture.feed(rep, 1)
    return [left.square().mean(), (right.square().sum() * 1024).round() + 0 * right.sum()]


def around_the_head(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    (left, right), rep = outputs(model)
    return [left.square().mean(), right.square().mean() + rep.square().mean()]


def noisy(model: TwoTasks, optimizer: RotoGradOptimizer) -> Sequence[Tensor]:
    (left, right), _ = outputs(model)
    noisy.calls += 1  # type: ignore[attr-defined]
    return [left.square().mean() + noisy.calls, right.square().mean()]  # type: ignore[attr-defined]


noisy.calls = 0  # type: ignore[attr-defined]

FAULTS: dict[str, tuple[LossesOf, str, str]] = {
    "swapped": (swapped, "check_losses_pass_through_their_heads", "must pass through its rotated head"),
    "bypassed": (bypassed, "check_losses_pass_through_their_heads", "must pass through its rotated head"),
    "of another head": (of_another_head, "check_rotations_reach_their_heads", "(a) a loss is computed from the output"),
    "of the norm": (of_the_norm, "check_rotations_reach_their_heads", "got that of right unchanged"),
    "around the head": (around_the_head, "check_backbone_gradients", "(a) a loss reaches the backbone around its head"),
    "noisy": (noisy, "check_losses_repeat", "must return the same losses at every call"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str) -> None:
    losses_of, check, message = FAULTS[name]
    model, optimizer = wrap(adam, rotation_size=6)
    before = snapshot(model, optimizer)
    for run in (getattr(testing, check), check_invariants):
        with pytest.raises(AssertionError) as error:
            run(optimizer, lambda: losses_of(model, optimizer))
        assert message in str(error.value)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.filterwarnings("ignore:`optimizer` should hold the parameters of every head")
def test_parameters_that_the_optimizer_lacks_are_found() -> None:
    model = TwoTasks()
    optimizer = RotoGradOptimizer(SGD(model.heads.parameters(), lr=0.1), heads=model.heads)
    with pytest.raises(AssertionError, match=r"got 1 that it lacks, of shapes \(6, 3\). Build it"):
        check_invariants(optimizer, lambda: model.losses(0)[0])


def test_gradient_hook_on_a_head_is_found() -> None:
    """One that acts where gradients arrive in ``.grad``, so that what is trained with is not the gradient."""
    model, optimizer = wrap(adam)
    weight = next(model.heads["left"].parameters())

    def negate(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.neg_()

    weight.register_post_accumulate_grad_hook(negate)  # type: ignore[no-untyped-call]
    with pytest.raises(AssertionError, match=r"of a head must be the gradient of the losses, .* \(c\) a gradient hook"):
        check_invariants(optimizer, lambda: model.losses(0)[0])


def test_matrices_that_are_no_rotations_are_found() -> None:
    _, optimizer = wrap(rotation_size=6)
    for broken in (1.01 * torch.eye(6), torch.eye(6).flip(0)):  # stretched, mirrored
        optimizer.rotations.load_matrices(broken.expand(2, 6, 6))
        with pytest.raises(AssertionError, match=r"must be orthogonal with determinant \+1, got an error of"):
            testing.check_rotations(optimizer)


def test_state_that_does_not_resume_is_found() -> None:
    model, optimizer = wrap(adam, rotation_size=6)
    train(model, optimizer, 0)
    optimizer.register_load_state_dict_post_hook(lambda each: each.state.clear())
    with pytest.raises(AssertionError, match="A step after loading the saved state must be the step without"):
        testing.check_resume(optimizer, lambda: model.losses(0)[0])
