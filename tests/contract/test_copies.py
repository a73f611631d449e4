"""Copies of model and optimizer train independently, and a copy of the model alone computes the same."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from rotoopt import GradNorm, RotoGradOptimizer
from tests.contract.models import (
    TwoTasks,
    adam,
    assert_moved,
    assert_same,
    back_propagate,
    gradients,
    parameters,
    snapshot,
    train,
    wrap,
)

Pair = tuple[TwoTasks, RotoGradOptimizer]


def through_a_file(pair: Pair) -> Pair:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    model, optimizer = torch.load(buffer, weights_only=False)
    return model, optimizer


COPIES: dict[str, Callable[[Pair], Pair]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": through_a_file,
}
WRAPPERS: dict[str, Callable[[], Pair]] = {
    "default": partial(wrap, adam),
    "every step": partial(wrap, adam, turn_every=1),
    "GradNorm, Adam": lambda: wrap(adam, weighting=GradNorm(), rotation_optimizer=Adam, normalize_losses=True),
}


@pytest.mark.parametrize("original_first", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", COPIES)
def test_copy_trains_independently(name: str, wrapper: str, original_first: bool) -> None:
    pair = WRAPPERS[wrapper]()
    StepLR(pair[1], 1)  # replaces `step` of this instance
    train(*pair, 0, 1)
    pairs = [pair, COPIES[name](pair)]
    before = snapshot(*pair)
    gradients = before.pop("gradients")
    assert_same({key: value for key, value in snapshot(*pairs[1]).items() if key != "gradients"}, before)

    one, other = pairs if original_first else pairs[::-1]
    for each in pairs:
        each[1].zero_grad()
    rest = snapshot(*other)
    train(*one, 2, 3)
    assert gradients
    assert_moved(*one, before)
    assert_same(snapshot(*other), rest)
    train(*other, 2, 3)
    assert_same(snapshot(*other), snapshot(*one))


@pytest.mark.parametrize("name", COPIES)
def test_copy_between_forward_and_backward(name: str) -> None:
    model, optimizer = wrap()
    train(model, optimizer, 0)
    losses, rep = model.losses(1)
    copied_model, copied = COPIES[name]((model, optimizer))
    copied.zero_grad()
    copied.step(*copied_model.losses(1))
    optimizer.zero_grad()
    optimizer.step(losses, rep)
    assert_same(snapshot(copied_model, copied), snapshot(model, optimizer))


@pytest.mark.parametrize("name", COPIES)
def test_copy_between_backward_and_step_has_no_gradients(name: str) -> None:
    """As in torch: a copied parameter has none, either."""
    model, optimizer = wrap(lambda params: SGD(params, lr=0.1), weighting=GradNorm())
    train(model, optimizer, 0)
    optimizer.zero_grad()
    optimizer.backward(*model.losses(1))
    copied_model, copied = COPIES[name]((model, optimizer))
    rest = snapshot(copied_model, copied)
    copied.step()
    assert_same(snapshot(copied_model, copied), rest)
    before = snapshot(model, optimizer)
    optimizer.step()
    assert_moved(model, optimizer, before)


def test_copy_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, backward passes are numbered from the start, and must not be confused with earlier ones."""
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 7)
    model, optimizer = wrap()
    optimizer.step([model.losses(0)[0][0], None])
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    optimizer.step([None, model.losses(0)[0][1]])


def test_shallow_copy_does_not_change_pending_gradients() -> None:
    model, optimizer = wrap()
    train(model, optimizer, 0)
    optimizer.zero_grad()
    optimizer.backward(*model.losses(1))
    before = snapshot(model, optimizer)
    copy.copy(optimizer)
    optimizer.step()
    assert_moved(model, optimizer, before)


@pytest.mark.parametrize("copy_first", [True, False])
def test_copy_of_the_model_alone_computes_the_same(copy_first: bool) -> None:
    model, optimizer = wrap(init="haar", rotation_size=4)
    train(model, optimizer, 0)
    copied = copy.deepcopy(model)
    x = model.inputs(1)
    expected = [output.detach() for output in model(x)]
    assert_same([output.detach() for output in copied(x)], expected)
    train(model, optimizer, 2)
    assert_same([output.detach() for output in copied(x)], expected)
    assert parameters(copied)


def alone(pair: Pair) -> TwoTasks:
    return pair[0]


def without_its_optimizer(pair: Pair) -> TwoTasks:
    return COPIES["pickle"](pair)[0]


ORPHANS: dict[str, Callable[[Pair], TwoTasks]] = {
    "deepcopy": lambda pair: copy.deepcopy(pair[0]),
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair[0])),
    "optimizer copied apart": lambda pair: (copy.deepcopy(pair[1]), copy.deepcopy(pair[0]))[1],
    "optimizer dropped": alone,
    "its copy dropped": without_its_optimizer,
}


@pytest.mark.parametrize("orphan", ORPHANS.values(), ids=ORPHANS)
def test_a_model_without_its_optimizer_has_plain_gradients(
    orphan: Callable[[Pair], TwoTasks],
) -> None:
    """A client, a student, a second stage of training: they keep the rotations, and use another optimizer."""
    model, optimizer = wrap(init="haar")
    train(model, optimizer, 0, 1)
    optimizer.zero_grad()
    with optimizer.paused():
        back_propagate(model.losses(2)[0])
    expected, predictions = gradients(model), [output.detach() for output in model(model.inputs(2))]
    optimizer.zero_grad()
    back_propagate(model.losses(2)[0])
    weighted = gradients(model)
    assert not torch.equal(*(each[0] for each in (weighted, expected)))  # type: ignore[arg-type]
    optimizer.zero_grad()
    client = orphan((model, optimizer))
    del model, optimizer
    gc.collect()
    bare = SGD(client.parameters(), lr=0.1)
    back_propagate(client.losses(2)[0])
    assert_same(gradients(client), expected)
    assert_same([output.detach() for output in client(client.inputs(2))], predictions)
    before = parameters(client)
    bare.step()
    assert all(not torch.equal(*pair) for pair in zip(before, parameters(client), strict=True))


@pytest.mark.parametrize("name", COPIES)
def test_a_head_that_references_its_optimizer_is_copied_with_it(name: str) -> None:
    """As modules of a Lightning model may do."""
    model, optimizer = wrap(adam, init="haar")
    model.heads["left"].trained_by = [optimizer]  # type: ignore[assignment]
    train(model, optimizer, 0)
    copied, its_optimizer = COPIES[name]((model, optimizer))
    assert copied.heads["left"].trained_by[0] is its_optimizer  # type: ignore[index]
    for each in ((model, optimizer), (copied, its_optimizer)):
        train(*each, 1)
    assert_same(snapshot(copied, its_optimizer), snapshot(model, optimizer))
