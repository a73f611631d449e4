"""Losses that were not computed from one representation through their rotated heads, or were used twice."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rotoopt import RotoGradOptimizer, RotoGradWeighting
from rotoopt._capture.hooks import attach
from rotoopt._capture.wiring import LOOK_EVERY
from tests.bad_input.cases import Case, check, left, losses_of, parametrize, representation, right
from tests.contract.models import TwoTasks, back_propagate, sgd, wrap

BYPASSED = (
    r"^The loss of right must pass through its rotated head, got one that passes through: none.* \(b\) the head was "
    r"bypassed.*: build it first, or call torch\._dynamo\.reset\(\)\.$"
)
MIXED = (
    "The loss of left must be computed from the output of its own head, got one that passes through that of right"
    r".* with rotate=False, .*\(d\) if the loss trains something else, .* run its forward pass under "
    r"optimizer\.paused\(\), or \(e\) .* write total = total \+ losses\[1\]\."
)
CASCADE = "Heads must read the backbone, got right, which reads an output of the head of left"
AROUND = (
    r"A parameter that tasks share must be reached through their heads, got .*weight.*, which the loss of right reaches"
)
ONE_TENSOR = "must see the gradients of all tasks at one tensor, got several \\(left: "
SPENT = "The losses of one forward pass must be back-propagated together and once, got a second backward pass"


def apart(
    to_left: Callable[[Tensor], Tensor], to_right: Callable[[Tensor], Tensor]
) -> Callable[[TwoTasks], list[Tensor]]:
    """Return a forward pass in which the inputs of the heads are different functions of the representation."""

    def forward(model: TwoTasks) -> list[Tensor]:
        rep = representation(model)
        return losses_of(left(model)(to_left(rep)), right(model)(to_right(rep)))

    return forward


def same(rep: Tensor) -> Tensor:
    return rep


def as_view(rep: Tensor) -> Tensor:
    return rep.view(-1, 6)


def mean(gradients: Tensor) -> Tensor:
    return gradients.mean(0)


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


def evaluated(model: TwoTasks) -> list[Tensor]:
    losses = in_eval_mode(model)
    model.train()
    return losses


def in_pause(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    with optimizer.paused():
        losses, rep = model.losses(5)
    return lambda: optimizer.step(losses, rep)


def two_batches(model: TwoTasks) -> list[Tensor]:
    return losses_of(left(model)(representation(model, 5)), right(model)(representation(model, 6)))


def consistency(model: TwoTasks) -> list[Tensor]:
    rep = representation(model)
    first, second = left(model)(rep), right(model)(rep)
    return [(first - second.mean()).square().mean(), second.square().mean()]


def cascade(model: TwoTasks) -> list[Tensor]:
    rep = representation(model)
    output = left(model)(rep)
    return losses_of(output, right(model)(rep + output.mean()))


def skip_connection(model: TwoTasks) -> list[Tensor]:
    rep = representation(model)
    return losses_of(left(model)(rep), right(model)(rep) + rep.mean())


def reentrant(model: TwoTasks) -> list[Tensor]:
    rep = representation(model)
    outputs = [checkpoint(head, rep, use_reentrant=True) for head in model.heads.values()]
    return losses_of(*outputs)


def other_optimizer(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    """The first task of another optimizer has the number of the first task of this one."""
    others = [nn.Linear(6, 1), nn.Linear(6, 2)]
    other = RotoGradOptimizer(sgd([param for head in others for param in head.parameters()]), others)
    losses, rep = model.losses(5)
    losses[0] = losses[0] + others[0](rep).square().mean()

    def step() -> None:
        assert other.last_step is None
        optimizer.step(losses)

    return step


def between_optimizers(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    """The same task number in both: as one task, it would be given two weights."""
    head = nn.Linear(6, 1)
    other = RotoGradOptimizer(sgd(head.parameters()), [head])
    rep = representation(model)
    losses = [(left(model)(rep) - head(rep)).square().mean(), right(model)(rep).square().mean()]

    def back() -> None:
        assert other.last_step is None
        back_propagate(losses)

    return back


def through_another_optimizer(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    """As a generator through its discriminator, both with several tasks."""
    others = [nn.Linear(2, 1), nn.Linear(2, 2)]
    other = RotoGradOptimizer(sgd([param for head in others for param in head.parameters()]), others)
    rep = representation(model)
    first, second = left(model)(rep), right(model)(rep)
    losses = [first.square().mean(), others[0](second).square().mean()]

    def back() -> None:
        assert other.last_step is None
        back_propagate(losses)

    return back


def before_wrapping(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    capture = optimizer._core.engine.capture
    for handle in capture.handles:
        handle.remove()
    losses, rep = model.losses(5)
    for task, head in enumerate(model.heads.values()):
        attach(capture, head, task, 0, "a")
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
    "head.forward": Case(RuntimeError, BYPASSED, steps_on(bypass)),
    "other head": Case(RuntimeError, BYPASSED, steps_on(other_head)),
    "swapped losses": Case(
        RuntimeError,
        "loss of left must pass through its rotated head, got one that passes through: right.*order of `losses`",
        steps_on(lambda model: model.losses(5)[0][::-1]),
        later=False,  # traversing the graph takes time, so it is done only if something has changed
    ),
    "eval mode": Case(
        RuntimeError,
        r"^Heads must run in training mode, got that of left in eval mode, .* Call model.train\(\) before",
        steps_on(in_eval_mode),
    ),
    "eval mode in the forward pass": Case(
        RuntimeError,
        r"passes through: none.*\(c\) it ran in eval mode, on z.detach\(\), under paused",
        steps_on(evaluated),
    ),
    "paused": Case(RuntimeError, r"passes through: none.*under paused\(\)", in_pause),
    "head of another optimizer": Case(
        RuntimeError,
        "^A loss must pass through heads of the optimizer that it is given to, got that of left, which passes through",
        other_optimizer,
    ),
    "heads of two optimizers, plain backward": Case(
        RuntimeError,
        "^A loss must pass through heads of one optimizer, got one that passes through heads of another.*with all",
        between_optimizers,
        later=False,
        inside=True,
    ),
    "through a head of another optimizer": Case(
        RuntimeError,
        "^Heads must read the backbone, got one that reads the output of a head of another RotoGradOptimizer",
        through_another_optimizer,
        later=False,
    ),
    "before wrapping": Case(RuntimeError, "passes through: none.*before the optimizer was built", before_wrapping),
    "backbone_loss through a head": Case(
        RuntimeError,
        "`backbone_loss` must not pass through a head, got one that passes through right. Add it to the loss of that",
        regularized_head,
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
    "head.forward, plain backward": Case(RuntimeError, BYPASSED, plain(bypass), later=False, inside=True),
    "consistency loss": Case(RuntimeError, MIXED, steps_on(consistency), later=False),
    "consistency loss, plain backward": Case(RuntimeError, MIXED, plain(consistency), later=False, inside=True),
    "head that reads another one": Case(RuntimeError, CASCADE, steps_on(cascade), later=False),
    "head that reads another one, plain backward": Case(
        RuntimeError, CASCADE, plain(cascade), later=False, inside=True
    ),
    "skip connection around a head": Case(RuntimeError, AROUND, steps_on(skip_connection), later=False),
    "skip connection around a head, plain backward": Case(
        RuntimeError, AROUND, plain(skip_connection), later=False, inside=True
    ),
    "view for a callable": Case(
        RuntimeError,
        rf"{ONE_TENSOR}\(5, 6\) made by .*; right: \(5, 6\) made by View\). Either \(a\) move the layers between",
        steps_on(apart(same, as_view)),
        {"weighting": lambda: mean},
    ),
    "view for a callable, plain backward": Case(
        RuntimeError, ONE_TENSOR, plain(apart(same, as_view)), {"weighting": lambda: mean}, inside=True
    ),
    "two batches for a callable": Case(RuntimeError, ONE_TENSOR, steps_on(two_batches), {"weighting": lambda: mean}),
    "after a plain backward": Case(
        RuntimeError, rf"{SPENT}.*your own sum\(losses\).backward\(\): call step\(\)", after_plain_backward
    ),
    "same losses again": Case(RuntimeError, SPENT, after_step),
    # Weights that are known before a backward pass serve several of them.
    "one after the other": Case(
        RuntimeError, rf"{SPENT}.*task has its own backward", one_after_the_other, {"weighting": RotoGradWeighting}
    ),
    "one after the other, plain backward": Case(
        RuntimeError, f"{SPENT}.*last_step", plain_backward_of_each, {"weighting": RotoGradWeighting}, inside=True
    ),
}


@parametrize(CASES)
def test_wiring(case: Case, steps: int) -> None:
    check(case, steps)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("num_right", [0, LOOK_EVERY - 1])
def test_rejected_losses_are_rejected_again(own: bool, num_right: int) -> None:
    """In a loop that catches errors and continues, after correct steps or none. Not every step is checked."""
    model, optimizer = wrap()
    for number in range(num_right + 3):
        optimizer.zero_grad()
        losses = model.losses(5)[0] if number < num_right else skip_connection(model)
        with nullcontext() if number < num_right else pytest.raises(RuntimeError, match=AROUND):
            back_propagate(losses) if own else optimizer.backward(losses)
        optimizer.step()


@pytest.mark.parametrize("period", [2, 3, 4, 8])
@pytest.mark.parametrize("own", [False, True])
def test_an_intermittent_fault_is_found(own: bool, period: int) -> None:
    """As in a loop that alternates between labeled and unlabeled batches."""
    model, optimizer = wrap()
    with pytest.raises(RuntimeError, match=AROUND):  # noqa: PT012
        for number in range(period * LOOK_EVERY + 1):
            optimizer.zero_grad()
            losses = skip_connection(model) if number % period == 1 else model.losses(5)[0]
            back_propagate(losses) if own else optimizer.backward(losses)
            optimizer.step()


def test_losses_of_another_kind_are_rejected_again() -> None:
    model, optimizer = wrap()
    optimizer.step(model.losses(5)[0])
    for _ in range(3):
        with pytest.raises(RuntimeError, match=AROUND):
            optimizer.backward([loss.exp() for loss in skip_connection(model)])
