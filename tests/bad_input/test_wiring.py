"""Losses that did not come, once and together, from the one representation through their rotated heads."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rotoopt import RotoGradOptimizer
from rotoopt._capture.hooks import attach
from tests.bad_input.cases import Case, check, left, losses_of, parametrize, representation, right
from tests.contract.models import TwoTasks, assert_same, back_propagate, snapshot, wrap

BYPASSED = "The loss of right must pass through its rotated head, got one that passes through: none"
NOT_SHARED = "All heads must get the same representation tensor, got"
TWO_TENSORS = f"{NOT_SHARED} two tensors, each for tasks of its own, in one backward pass"
SPENT = "The losses of one forward pass must be back-propagated together and once, got a second backward pass"


def apart(
    to_left: Callable[[Tensor], Tensor], to_right: Callable[[Tensor], Tensor]
) -> Callable[[TwoTasks], list[Tensor]]:
    """Return a forward pass that feeds the heads with different functions of the representation."""

    def forward(model: TwoTasks) -> list[Tensor]:
        rep = representation(model)
        return losses_of(left(model)(to_left(rep)), right(model)(to_right(rep)))

    return forward


def same(rep: Tensor) -> Tensor:
    return rep


def as_view(rep: Tensor) -> Tensor:
    return rep.view(-1, 6)


def steps_on(forward: Callable[[TwoTasks], list[Tensor]]) -> Callable[[TwoTasks, Any], Callable[[], object]]:
    return lambda model, optimizer: partial(optimizer.step, forward(model))


def plain(forward: Callable[[TwoTasks], list[Tensor]]) -> Callable[[TwoTasks, Any], Callable[[], object]]:
    return lambda model, optimizer: partial(back_propagate, forward(model))


def bypass(model: TwoTasks) -> list[Tensor]:
    rep = representation(model)
    return losses_of(left(model)(rep), right(model).forward(rep))


def other_head(model: TwoTasks) -> list[Tensor]:
    rep = representation(model)
    return losses_of(left(model)(rep), nn.Linear(6, 2)(rep))


def in_eval_mode(model: TwoTasks) -> list[Tensor]:
    model.eval()
    return model.losses(5)[0]


def in_pause(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    with optimizer.paused():
        losses, rep = model.losses(5)
    return lambda: optimizer.step(losses, rep)


def two_batches(model: TwoTasks) -> list[Tensor]:
    return losses_of(left(model)(representation(model, 5)), right(model)(representation(model, 6)))


def reentrant(model: TwoTasks) -> list[Tensor]:
    rep = representation(model)
    outputs = [checkpoint(head, rep, use_reentrant=True) for head in model.heads.values()]
    return losses_of(*outputs)


def before_wrapping(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    optimizer.remove()
    losses, rep = model.losses(5)
    for task, head in enumerate(model.heads.values()):
        attach(optimizer._core.engine.capture, head, task, 0)
    return lambda: optimizer.step(losses, rep)


def after_plain_backward(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    losses, rep = model.losses(5)
    back_propagate(losses)
    return lambda: optimizer.step(losses, rep)


def after_step(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    losses, rep = model.losses(5)
    optimizer.step(losses, rep)
    return lambda: optimizer.step(losses, rep)


def one_after_the_other(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    losses, rep = model.losses(5)
    optimizer.backward([losses[0], None], rep)
    return lambda: optimizer.backward([None, losses[1]], rep)


def plain_backward_of_each(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    losses = model.losses(5)[0]
    torch.autograd.backward(losses[0], retain_graph=True)
    return lambda: torch.autograd.backward(losses[1])


def regularized_head(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    losses, rep = model.losses(5)
    return lambda: optimizer.step(losses, rep, backbone_loss=right(model)(rep).square().sum())


CASES = {
    "head.forward": Case(RuntimeError, rf"{BYPASSED}.*\(b\) the head was bypassed", steps_on(bypass)),
    "other head": Case(RuntimeError, rf"{BYPASSED}.*\(b\) the head was bypassed", steps_on(other_head)),
    "swapped losses": Case(
        RuntimeError,
        "loss of left must pass through its rotated head, got one that passes through: right.*in another order",
        steps_on(lambda model: model.losses(5)[0][::-1]),
        later=False,  # walking through the graph takes time, so it is done where something has changed
    ),
    "eval mode": Case(
        RuntimeError,
        r"passes through: none.*\(c\) it ran in eval mode, on z.detach\(\), under paused",
        steps_on(in_eval_mode),
    ),
    "paused": Case(RuntimeError, r"passes through: none.*under paused\(\)", in_pause),
    "before wrapping": Case(RuntimeError, "passes through: none.*before the optimizer was built", before_wrapping),
    "detached for the first": Case(
        RuntimeError, r"loss of left must.*passes through: none.*z.detach\(\)", steps_on(apart(Tensor.detach, same))
    ),
    "detached for the second": Case(RuntimeError, rf"{BYPASSED}.*z.detach\(\)", steps_on(apart(same, Tensor.detach))),
    "backbone_loss through a head": Case(
        RuntimeError,
        "`backbone_loss` must not pass through a head, got one that passes through right. Add it to the loss of that",
        regularized_head,
        later=False,
    ),
    "re-entrant checkpointing": Case(
        RuntimeError,
        r"passes through: none.*re-entrant checkpointing \(pass use_reentrant=False\)",
        steps_on(reentrant),
    ),
    "re-entrant checkpointing, plain backward": Case(
        RuntimeError,
        r"must get the representation itself, got a detached copy.*pass use_reentrant=False to checkpoint\(\)",
        plain(reentrant),
    ),
    "view": Case(
        RuntimeError,
        f"{NOT_SHARED} one for left and another for right.*a view or a copy.*: reshape once, before the first head",
        steps_on(apart(same, as_view)),
    ),
    "two views": Case(RuntimeError, f"{NOT_SHARED} one for left", steps_on(apart(as_view, lambda rep: rep[:]))),
    "copy": Case(RuntimeError, f"{NOT_SHARED} one for left", steps_on(apart(Tensor.clone, same))),
    "two batches": Case(RuntimeError, f"{NOT_SHARED} one for left.*separate steps, with None", steps_on(two_batches)),
    "view, plain backward": Case(
        RuntimeError, f"{TWO_TENSORS}.*reshape once", plain(apart(same, as_view)), first=False, inside=True
    ),
    "two batches, plain backward": Case(
        RuntimeError, f"{TWO_TENSORS}.*separate backward passes", plain(two_batches), first=False, inside=True
    ),
    "after a plain backward": Case(RuntimeError, rf"{SPENT}.*your own sum\(losses\).backward", after_plain_backward),
    "same losses again": Case(RuntimeError, SPENT, after_step),
    "one after the other": Case(RuntimeError, rf"{SPENT}.*every task has a backward", one_after_the_other),
    "one after the other, plain backward": Case(
        RuntimeError, f"{SPENT}.*last_step", plain_backward_of_each, inside=True
    ),
}


@parametrize(CASES)
def test_wiring(case: Case, steps: int) -> None:
    check(case, steps)


@pytest.mark.parametrize("forward", [apart(same, as_view), two_batches], ids=["view", "two batches"])
def test_first_plain_backward(forward: Callable[[TwoTasks], list[Tensor]]) -> None:
    """What the first of the two tensors brought is a reference by then: the rest is as it was."""
    model, optimizer = wrap(rotation_size=6)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=TWO_TENSORS):
        back_propagate(forward(model))
    after = snapshot(model, optimizer)
    for state in (before, after):
        del state["gradients"], state["optimizer"]["rotograd"]["norm_reference"]
    assert_same(after, before)
