"""Copies, averages and targets have the rotations of their weights, or a warning is issued."""

import copy
import gc
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from rotoopt import RotoGradOptimizer
from tests.contract.models import TwoTasks, assert_same, sgd, snapshot, train, wrap

# Rotations far from I, updated in every step.
OPTIONS: dict[str, Any] = {"init": "haar", "rotation_optimizer": partial(SGD, lr=1.0)}
STALE = "A copy of the model should have the rotations that its weights were trained with"


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(model(x))


def test_average_of_the_weights_is_reported_until_it_is_refreshed() -> None:
    model, optimizer = wrap(**OPTIONS)
    x = model.inputs(9)
    train(model, optimizer, 0)
    average = AveragedModel(model, avg_fn=lambda old, new, _: (old + new) / 2)
    predict(average, x)
    for batch in (1, 3):
        train(model, optimizer, batch, batch + 1)
        average.update_parameters(model)
        with pytest.warns(UserWarning, match=STALE):
            predict(average, x)
        optimizer.refresh(average)
        predict(average, x)
        average.update_parameters(model)  # rotations have not been updated since
        predict(average, x)
    assert_same(predict(average, x), predict(average.module, x))


def by_copy(theirs: Tensor, own: Tensor) -> None:
    with torch.no_grad():
        theirs.copy_(own)


def by_lerp(theirs: Tensor, own: Tensor) -> None:
    theirs.data.mul_(0.5).add_(own.data, alpha=0.5)


def by_data(theirs: Tensor, own: Tensor) -> None:
    theirs.data = own.detach().clone()


UPDATES: dict[str, Callable[[Tensor, Tensor], None]] = {"copy": by_copy, "lerp of data": by_lerp, "other data": by_data}


@pytest.mark.parametrize("mode", ["eval", "train", "train, no_grad"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_a_target_network_is_reported_once_for_every_update(
    update: Callable[[Tensor, Tensor], None], frozen: bool, mode: str
) -> None:
    """For every way to write its weights, in both modes."""
    model, optimizer = wrap(**OPTIONS)
    x = model.inputs(9)
    train(model, optimizer, 0)
    target = copy.deepcopy(model).requires_grad_(not frozen)
    target.train(mode != "eval")

    def run() -> int:
        with warnings.catch_warnings(record=True) as record, nullcontext() if mode == "train" else torch.no_grad():
            warnings.simplefilter("always")
            target(x)
        assert all(str(each.message).startswith(STALE) for each in record)
        return len(record)

    for _ in range(2):
        train(model, optimizer, 1)
        assert run() == 0  # a copy of the earlier model
        train(model, optimizer, 2)
        for theirs, own in zip(target.parameters(), model.parameters(), strict=True):
            update(theirs, own)
        assert run() == 2  # heads
        assert run() == 0
    train(model, optimizer, 3)
    target.load_state_dict(model.state_dict())
    assert_same(predict(target, x), predict(model, x))
    train(model, optimizer, 4)
    assert run() == 0
    target.bfloat16()
    with torch.no_grad():
        target(x.bfloat16())


def warned(model: nn.Module, x: Tensor) -> int:
    """Return the number of warnings of stale rotations."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model(x)
    assert all(str(each.message).startswith(STALE) for each in record)
    return len(record)


def test_weights_that_are_written_between_updates_are_reported_in_training_mode() -> None:
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0)
    target = copy.deepcopy(model)
    train(model, optimizer, 1)
    assert warned(target, model.inputs(9)) == 0
    for theirs, own in zip(target.parameters(), model.parameters(), strict=True):
        by_copy(theirs, own)
    assert warned(target, model.inputs(9)) == 2  # heads


def test_weights_that_are_written_after_others_were_loaded_are_reported() -> None:
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0)
    target = copy.deepcopy(model)
    target.load_state_dict(model.state_dict())
    train(model, optimizer, 1)
    for theirs, own in zip(target.parameters(), model.parameters(), strict=True):
        by_copy(theirs, own)
    assert warned(target.eval(), model.inputs(9)) == 2  # heads


def test_a_copy_outlives_its_model() -> None:
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0)
    x, target = model.inputs(9), copy.deepcopy(model)
    train(model, optimizer, 1)
    expected, state = predict(model, x), model.state_dict()
    del model, optimizer
    gc.collect()
    target.load_state_dict(state)
    assert_same(predict(target, x), expected)


def test_a_copy_of_a_copy_that_is_trained_itself_is_not_reported() -> None:
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0)
    student = copy.deepcopy(model)
    for _ in range(2):
        student(model.inputs(9))
    awaited = [weight._post_accumulate_grad_hooks for weight in student.heads.parameters()]
    assert [len(each) for each in awaited] == [1, 1]
    second = copy.deepcopy(student)
    bare = sgd(second.parameters())
    train(model, optimizer, 1)
    optimizer.refresh(student)
    torch.autograd.backward(second.losses(0)[0])
    bare.step()
    assert warned(second.eval(), model.inputs(9)) == 0


@pytest.mark.parametrize("clears", [False, True])
def test_a_copy_that_is_trained_itself_is_not_reported(clears: bool) -> None:
    model, optimizer = wrap(**OPTIONS)
    student = copy.deepcopy(model)
    bare = sgd(student.parameters())
    for batch in range(3):
        train(model, optimizer, batch)
        torch.autograd.backward(student.losses(batch)[0])
        bare.step()
        if clears:
            bare.zero_grad()
        predict(student.eval(), model.inputs(9))
        student.train()


def test_correct_copies_are_not_reported() -> None:
    model, optimizer = wrap(**OPTIONS)
    x = model.inputs(9)
    train(model, optimizer, 0)
    best, target, student = (copy.deepcopy(model) for _ in range(3))
    expected = predict(model, x)
    average = copy.deepcopy(model)
    by_lerp(next(average.heads.parameters()), torch.zeros(1))
    predict(average, x)  # no rotation has been updated since
    bare = sgd(student.parameters())
    train(model, optimizer, 1)
    assert_same(predict(best, x), expected)
    target.load_state_dict(model.state_dict())
    assert_same(predict(target, x), predict(model, x))
    torch.autograd.backward(student.losses(0)[0])
    bare.step()
    predict(student, x)  # trained with its own rotations


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("heads", [["left", "right"], ["right"]])
def test_a_new_optimizer_takes_over_the_rotations(heads: list[str], copied: bool) -> None:
    """A second stage of training, a notebook cell that runs again, a copy of the model."""
    model, optimizer = wrap(**OPTIONS)
    x = model.inputs(9)
    train(model, optimizer, 0, 1)
    expected, rotations = predict(model, x), optimizer.rotations.matrices.clone()
    model = copy.deepcopy(model) if copied else model
    second = RotoGradOptimizer(sgd(model.parameters()), {name: model.heads[name] for name in heads})
    assert_same(predict(model, x), expected)
    assert_same(second.rotations.matrices, rotations[-len(heads) :])
    assert all(len(model.heads[name]._forward_pre_hooks) == 1 for name in model.heads)
    second.zero_grad()
    losses = dict(zip(model.heads, model.losses(2)[0], strict=True))
    second.step({name: losses[name] for name in heads})


def test_wrapping_the_same_optimizer_again_is_like_wrapping_one_with_its_state() -> None:
    runs = []
    for again in (True, False):
        model, optimizer = wrap()
        train(model, optimizer, 0, 1)
        inner = optimizer.optimizer if again else sgd(model.parameters())
        inner.load_state_dict(copy.deepcopy(optimizer.optimizer.state_dict()))
        second = RotoGradOptimizer(inner, model.heads)
        train(model, second, 2, 3)
        runs.append(snapshot(model, second))
    assert_same(*runs)


@pytest.mark.parametrize("kept", ["both heads", "one head"])
def test_an_optimizer_that_was_replaced_raises_an_error_before_it_changes_anything(kept: str) -> None:
    """As in a trainer that was built before a notebook cell ran again."""
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0, 1)
    saved, copied = optimizer.state_dict(), copy.deepcopy(model)
    names = list(model.heads)[: 2 if kept == "both heads" else 1]
    second = RotoGradOptimizer(sgd(model.parameters()), {name: model.heads[name] for name in names})
    losses, weights = model.losses(2)[0], copy.deepcopy(model.state_dict())
    model.zero_grad()
    message = "^The latest RotoGradOptimizer of the heads must be used, got one that a later one has replaced"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(losses)
    with pytest.raises(RuntimeError, match=message):
        optimizer.backward(losses)
    with pytest.raises(RuntimeError, match=message), optimizer.paused():
        pass
    for use in (optimizer.fold, optimizer.state_dict, partial(optimizer.load_state_dict, saved)):
        with pytest.raises(RuntimeError, match=message):
            use()
    with pytest.raises(RuntimeError, match=message):
        optimizer.refresh(copied)
    assert all(param.grad is None for param in model.parameters())
    torch.autograd.backward(losses[: len(names)])
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    second.step()


class ModelEmaV3(nn.Module):
    """Like that of timm: an average that is no ``AveragedModel``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)


@pytest.mark.parametrize("kind", [AveragedModel, ModelEmaV3])
@pytest.mark.parametrize("of", ["the model", "one like it", "another model", "nothing"])
def test_an_average_made_before_the_optimizer_is_reported(of: str, kind: Callable[[nn.Module], nn.Module]) -> None:
    model = TwoTasks()
    copied = {"the model": model, "one like it": TwoTasks(), "another model": nn.Linear(2, 2), "nothing": None}[of]
    averaged = None if copied is None else kind(copied)
    name = getattr(kind, "__name__", "")
    message = (
        f"^An average of the model must be created after the optimizer, got a {name} from before it.* once those "
        r"of the model are updated\. Create it again, and call optimizer\.refresh\(averaged\) before using it\.$"
    )
    with pytest.warns(UserWarning, match=message) if of == "the model" else nullcontext():
        RotoGradOptimizer(sgd(model.parameters()), model.heads)
    del averaged
    with_hooks = AveragedModel(model)
    RotoGradOptimizer(sgd(model.parameters()), model.heads)
    del with_hooks


def test_a_rotation_inside_of_a_new_head_is_an_error_until_it_is_folded() -> None:
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0, 1)
    outer = {name: nn.Sequential(nn.Tanh(), head) for name, head in model.heads.items()}
    message = (
        "`heads` must be the modules of the previous optimizer, or modules without rotations, got left, which has one "
        "in front of its Linear. Call fold() on that optimizer first, to merge the rotations into the heads."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RotoGradOptimizer(sgd(model.parameters()), outer)
    optimizer.fold()
    RotoGradOptimizer(sgd(model.parameters()), outer)


def test_new_heads_may_contain_heads_whose_rotations_are_still_the_identity() -> None:
    model, _ = wrap()
    outer = {name: nn.Sequential(nn.Tanh(), head) for name, head in model.heads.items()}
    RotoGradOptimizer(sgd(model.parameters()), outer)


def test_wrapped_heads_take_over_the_rotations() -> None:
    """Unlike a sequence, the wrapper only changes the names of the parameters."""
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0, 1)
    wrapped = {name: nn.DataParallel(head) for name, head in model.heads.items()}
    second = RotoGradOptimizer(sgd(model.parameters()), wrapped)
    assert_same(second.rotations.matrices, optimizer.rotations.matrices)
