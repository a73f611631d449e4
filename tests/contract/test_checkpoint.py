"""Checkpoints: resuming is bit-identical, and a state that does not fit is rejected before anything changes."""

import copy
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer, RotoGradWeighting
from tests.contract.models import TwoTasks, adam, assert_same, sgd, snapshot, train, wrap

BURN_IN = 4
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "RotoGradWeighting": lambda: {"weighting": RotoGradWeighting(), "normalize_losses": True},
    "EqualWeighting": lambda: {"weighting": EqualWeighting()},
    "GradNorm": lambda: {"weighting": GradNorm(alpha=0.5)},
    "callable": lambda: {"weighting": lambda grads: grads.sum(0)},
    "Adam": lambda: {"rotation_optimizer": lambda params: Adam(params, lr=0.01)},
    "rotation_size": lambda: {"rotation_size": 4},
    "rotation_size, Adam": lambda: {"rotation_size": 4, "rotation_optimizer": Adam},
    "haar": lambda: {"init": "haar", "rotation_size": 4},
    "haar, lazily": lambda: {"init": "haar"},
    "rotate": lambda: {"rotate": [False, True], "rotation_lr": 0.1},
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("num_steps", [0, 2, BURN_IN + 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_resume(options: str, num_steps: int) -> None:
    model, optimizer = wrap(adam, burn_in_period=BURN_IN, **OPTIONS[options]())
    train(model, optimizer, *range(num_steps))
    state = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    torch.manual_seed(1)
    resumed_model, resumed = wrap(adam, burn_in_period=BURN_IN, **OPTIONS[options]())
    train(resumed_model, resumed, 100)  # all of this is overwritten
    resumed_model.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    for each_model, each in ((model, optimizer), (resumed_model, resumed)):
        train(each_model, each, 20, 21, 22)  # Haar rotations may be drawn now
    assert_same(snapshot(resumed_model, resumed), snapshot(model, optimizer))


@pytest.mark.parametrize("which", ["model", "optimizer", "deepcopy"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("init", ["haar", "identity"])
def test_rotations_that_are_not_drawn_yet_are_known(init: Any, trained: bool, which: str) -> None:
    """What was saved before the first forward pass leads to the same rotations, in another run as well."""
    model, optimizer = wrap(adam, init=init, rotation_lr=0.0)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    copied, its_optimizer = copy.deepcopy((model, optimizer))
    torch.manual_seed(1)
    if which != "deepcopy":
        copied, its_optimizer = wrap(adam, init="haar" if init == "identity" else "identity", rotation_lr=0.0)
        if trained:
            train(copied, its_optimizer, 100)
        copied.load_state_dict(saved["model"])
        if which == "optimizer":
            its_optimizer.load_state_dict(saved["optimizer"])
    for each_model, each in ((model, optimizer), (copied, its_optimizer)):
        train(each_model, each, 0)
    assert_same(its_optimizer.rotations.matrices, optimizer.rotations.matrices)
    assert torch.equal(optimizer.rotations[0], torch.eye(6)) == (init == "identity")


def test_heads_that_are_loaded_leave_the_others_as_they_would_be_drawn() -> None:
    model, optimizer = wrap(init="haar", rotation_lr=0.0)
    train(model, optimizer, 0)
    torch.manual_seed(1)
    other, loaded = wrap(init="haar", rotation_lr=0.0)
    alone, expected = copy.deepcopy((other, loaded))
    other.heads["left"].load_state_dict(model.heads["left"].state_dict())
    for each_model, each in ((other, loaded), (alone, expected)):
        train(each_model, each, 0)
    assert_same(loaded.rotations[0], optimizer.rotations[0])
    assert_same(loaded.rotations[1], expected.rotations[1])


def test_plain_state_dict_loads_with_one_warning() -> None:
    model, optimizer = wrap(adam)
    bare = Adam(model.parameters(), lr=0.5)
    train(model, optimizer, 0)
    own = optimizer.state_dict()["rotograd"]
    message = (
        "The state dict should have an entry 'rotograd', got one without. Rotations, references and trained weights do "
        "not change. Either (a) it is that of a bare optimizer, or (b) it comes from torch.distributed.checkpoint: "
        "save and load optimizer.rotograd_state as well, and load it first."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as record:
        optimizer.load_state_dict(state_dict=bare.state_dict())
    assert len(record) == 1
    assert record[0].filename == __file__
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer.state
    assert_same(optimizer.state_dict()["rotograd"], own)


def test_state_dict_loads_into_the_bare_optimizer() -> None:
    model, optimizer = wrap(adam)
    train(model, optimizer, 0, 1)
    bare = Adam(model.parameters())
    bare.load_state_dict(optimizer.state_dict())
    assert_same(bare.state_dict(), optimizer.optimizer.state_dict())


def test_state_dict_is_a_snapshot() -> None:
    for loaded_from in (False, True):
        model, optimizer = wrap(weighting=GradNorm(), rotation_optimizer=Adam)
        train(model, optimizer, 0, 1)
        own = optimizer.state_dict()["rotograd"]
        if loaded_from:
            optimizer.load_state_dict(optimizer.optimizer.state_dict() | {"rotograd": own})
        before = copy.deepcopy(own)
        train(model, optimizer, 2, 3)
        assert_same(own, before)
        assert own["num_steps"] == 2


def test_loading_does_not_change_the_state_dict() -> None:
    model, optimizer = wrap()
    train(model, optimizer, 0)
    state_dict = optimizer.state_dict()
    keys = list(state_dict)
    optimizer.load_state_dict(state_dict)
    assert list(state_dict) == keys


def test_gradients_from_before_loading_are_discarded() -> None:
    model, optimizer = wrap(lambda params: SGD(params, lr=0.1))
    train(model, optimizer, 0)
    state_dict = optimizer.state_dict()
    optimizer.backward(*model.losses(1))
    optimizer.load_state_dict(state_dict)
    optimizer.step()
    assert_same(optimizer.state_dict()["rotograd"], state_dict["rotograd"])


def three_tasks(**options: Any) -> tuple[TwoTasks, RotoGradOptimizer]:
    model, optimizer = wrap(sgd)
    optimizer.remove()
    model.heads["third"] = torch.nn.Linear(6, 2, bias=False).requires_grad_(False)
    return model, RotoGradOptimizer(optimizer.optimizer, heads=model.heads, **options)


# The saved optimizer, the one that loads it, and the error.
Builder = Callable[[], tuple[TwoTasks, RotoGradOptimizer]]
MISFITS: dict[str, tuple[Builder, Builder, str]] = {
    "tasks": (
        wrap,
        three_tasks,
        "must be of 3 tasks, got 2. Build the optimizer with the heads that it was saved with.",
    ),
    "size": (
        lambda: wrap(rotation_size=4),
        lambda: wrap(rotation_size=5),
        "must have rotations of 5 features, got 4. Build the optimizer with the representation and `rotation_size`",
    ),
    "size after a forward pass": (
        lambda: wrap(rotation_size=4),
        wrap,
        "must have rotations of 6 features, got 4.",
    ),
    "rotate": (
        lambda: wrap(turn_every=1),
        lambda: wrap(rotate=[True, False]),
        "must have R = I where rotate=False, got another one for task 1. Build the optimizer with the `rotate` flags",
    ),
    "weighting": (
        wrap,
        lambda: wrap(weighting=GradNorm(alpha=0.5)),
        "must be of weighting GradNorm(alpha=0.5), got that of ProgressWeighting. Build the optimizer with the "
        "`weighting` that it was saved with.",
    ),
    "trained weighting": (
        lambda: wrap(weighting=GradNorm()),
        wrap,
        "must be of weighting ProgressWeighting(alpha=0.75), got that of GradNorm.",
    ),
    "rotation optimizer": (
        wrap,
        lambda: wrap(rotation_optimizer=Adam),
        "must be of a `rotation_optimizer`, got that of the built-in rotation step. Build the optimizer with the "
        "`rotation_optimizer` that",
    ),
    "built-in step": (
        lambda: wrap(rotation_optimizer=Adam),
        wrap,
        "must be of the built-in rotation step, got that of a `rotation_optimizer`.",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_state_that_does_not_fit_is_rejected(name: str) -> None:
    saved, loading, message = MISFITS[name]
    state_dicts, pairs = [], (saved(), loading())
    for seed, (model, optimizer) in enumerate(pairs):
        for batch in (seed, seed + 2):
            losses, rep = forward(model, batch, len(model.heads))
            optimizer.zero_grad()
            optimizer.step(losses, rep)
        state_dicts.append(optimizer.state_dict())
    before = snapshot(*pairs[1])
    with pytest.raises(ValueError, match=re.escape(f"The state dict {message}")):
        pairs[1][1].load_state_dict(state_dicts[0])
    assert_same(snapshot(*pairs[1]), before)


def forward(model: TwoTasks, batch: int, num_tasks: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    rep = model.backbone(model.inputs(batch))
    return [head(rep).square().mean() for head in model.heads.values()][:num_tasks], rep


def test_weightings_without_state_can_be_exchanged() -> None:
    model, optimizer = wrap(weighting=EqualWeighting())
    train(model, optimizer, 0)
    other_model, other = wrap(weighting=RotoGradWeighting())
    other.load_state_dict(optimizer.state_dict())
    assert_same(other.rotations.matrices, optimizer.rotations.matrices)
    train(other_model, other, 1)


def test_other_groups_are_rejected_as_by_torch() -> None:
    model, optimizer = wrap()
    train(model, optimizer, 0)
    before = snapshot(model, optimizer)
    other_model, other = wrap()
    train(other_model, other, 0, 1)
    other.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with warnings.catch_warnings(), pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other.state_dict())
    assert_same(snapshot(model, optimizer), before)
