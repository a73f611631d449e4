"""The checks pass for all options, change nothing, and do not catch errors of the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer, testing
from rotoopt.testing import check_invariants
from tests.contract.models import adam, assert_same, snapshot, train, wrap

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
def test_good_model_passes_and_is_not_changed(options: str, num_steps: int) -> None:
    model, optimizer = wrap(adam, **OPTIONS[options]())
    train(model, optimizer, *range(num_steps))
    before, record = snapshot(model, optimizer), optimizer.last_step
    check_invariants(optimizer, lambda: model.losses(7)[0])
    assert_same(snapshot(model, optimizer), before)
    assert optimizer.last_step is record
    train(model, optimizer, 8)  # and training can continue


def test_functional_heads_and_dropout_and_absent_tasks() -> None:
    model, optimizer = wrap(adam, num_tasks=2, rotation_size=6)
    dropout = nn.Dropout(0.5)

    def losses() -> list[Tensor | None]:
        left, _ = model.losses(0, lambda rep: [dropout(each) for each in optimizer.rotate(rep)])[0]
        return [left, None]

    check_invariants(optimizer, losses)


def test_checks_do_not_depend_on_earlier_gradients() -> None:
    """An earlier forward pass and its gradients neither affect the checks nor are changed by them."""
    model, optimizer = wrap(adam)
    losses, rep = model.losses(0)
    optimizer.backward(losses, rep)
    before = snapshot(model, optimizer)["gradients"]
    model(model.inputs(1))
    check_invariants(optimizer, lambda: model.losses(0)[0])
    assert_same(snapshot(model, optimizer)["gradients"], before)


REFUSED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "single tensor": (Tensor.sum, "`losses` must be a sequence with one loss per task, or a tensor of shape"),
    "too few": (lambda output: [output.sum()], "must have one entry per task, got 1 for 2 tasks"),
    "not reduced": (lambda output: [output, output], r"must be a scalar, got shape \(5, 1\) for left"),
    "numbers": (lambda output: [output.sum().item()] * 2, "`losses` must be tensors or None, got a float for left"),
    "wrong name": (lambda output: {"middle": output.sum()}, r"must be named after the tasks .*\['middle'\] as well"),
    "detached": (lambda output: [output.detach().sum()] * 2, "Every loss must have a graph, got one without for left"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_losses_that_a_step_would_reject_fail_the_check(name: str) -> None:
    make, message = REFUSED[name]
    model, optimizer = wrap(adam)
    with pytest.raises(AssertionError, match=message):
        check_invariants(optimizer, lambda: make(model(model.inputs(0))[0]))  # type: ignore[arg-type, return-value]


def test_errors_of_the_model_are_not_caught() -> None:
    """They show their origin, and those of the rotations say what to do."""
    model, optimizer = wrap(adam, rotation_size=7)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="must have at least rotation_size=7 features"):
        check_invariants(optimizer, lambda: model.losses(0)[0])
    with pytest.raises(KeyError, match="middle"):
        check_invariants(optimizer, lambda: [model.heads["middle"](torch.zeros(1)), None])
    assert_same(snapshot(model, optimizer), before)


def test_an_optimizer_whose_constructor_failed_may_still_exist() -> None:
    """As the traceback of an error keeps it."""
    model, optimizer = wrap(adam)
    failed = RotoGradOptimizer.__new__(RotoGradOptimizer)
    with pytest.raises(ValueError, match="must be"):
        failed.__init__(optimizer.optimizer, model.heads, burn_in_period=-1)  # type: ignore[misc]
    check_invariants(optimizer, lambda: model.losses(0)[0])


def test_rotations_may_not_exist_yet() -> None:
    _, optimizer = wrap(adam)
    testing.check_rotations(optimizer)
    assert optimizer.rotations.size is None
