"""Hooks of the optimizer run as often, in the order and with the arguments documented by torch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rotoopt import GradNorm, RotoGradOptimizer
from rotoopt._rotation.cayley_step import NormalizedStep
from tests.contract.models import adam, assert_same, parameters, train, wrap

Calls = list[tuple[str, type[Optimizer]]]


@pytest.fixture
def global_calls() -> Iterator[Calls]:
    calls: Calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: calls.append(("global pre", type(optimizer)))),
        register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(("global post", type(optimizer)))),
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_order_of_step_hooks(global_calls: Calls) -> None:
    """Global hooks run for the wrapped optimizer and that of the rotations, but not for the wrapper."""
    model, optimizer = wrap(adam)
    for each in (optimizer, optimizer.optimizer):
        each.register_step_pre_hook(lambda optimizer, *_: global_calls.append(("pre", type(optimizer))))
        each.register_step_post_hook(lambda optimizer, *_: global_calls.append(("post", type(optimizer))))
    train(model, optimizer, 0)
    assert global_calls == [
        ("pre", RotoGradOptimizer),
        ("global pre", Adam),
        ("pre", Adam),
        ("post", Adam),
        ("global post", Adam),
        ("global pre", NormalizedStep),
        ("global post", NormalizedStep),
        ("post", RotoGradOptimizer),
    ]


def test_global_hooks_of_trained_weights(global_calls: Calls) -> None:
    model, optimizer = wrap(weighting=GradNorm(optimizer=Adam), rotation_optimizer=torch.optim.RMSprop)
    train(model, optimizer, 0)
    optimizer.step()  # without a backward pass, so the network only
    assert [cls for hook, cls in global_calls if hook == "global post"] == [SGD, Adam, torch.optim.RMSprop, SGD]


def test_step_hooks_get_the_arguments_of_the_call() -> None:
    model, optimizer = wrap()
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append((args, kwargs)))
    handle = optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.append((args, kwargs)))
    losses, rep = model.losses(0)
    optimizer.step(losses, rep)
    assert len(seen) == 2
    for args, _ in seen:
        assert args[0] is optimizer
        assert args[1] is losses
        assert args[2] is rep
    handle.remove()
    optimizer.step()
    assert len(seen) == 3


def test_pre_hook_replaces_the_arguments() -> None:
    (model, optimizer), (expected_model, expected) = wrap(), wrap()

    def double(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        this, losses, *rest = args
        return (this, [2 * loss for loss in losses], *rest), kwargs

    optimizer.register_step_pre_hook(double)
    for batch in range(2):
        train(model, optimizer, batch)
        losses, rep = expected_model.losses(batch)
        expected.zero_grad()
        expected.step([2 * loss for loss in losses], rep)
    assert_same(parameters(model), parameters(expected_model))


def test_pre_hook_must_return_both() -> None:
    model, optimizer = wrap()
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: args)
    before = parameters(model)
    with pytest.raises(TypeError, match=r"must return None or a tuple \(args, kwargs\)"):
        optimizer.step(*model.losses(0))
    assert_same(parameters(model), before)


def test_state_dict_hooks() -> None:
    _, optimizer = wrap()
    calls: list[str] = []

    def mark(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        return {**state_dict, "mark": 1}

    optimizer.register_state_dict_pre_hook(lambda optimizer: calls.append("pre"))
    optimizer.register_state_dict_post_hook(mark)
    optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: None)
    state_dict = optimizer.state_dict()
    assert calls == ["pre", "post"]
    assert set(state_dict) == {"state", "param_groups", "rotograd", "mark"}


def test_load_state_dict_hooks() -> None:
    _, optimizer = wrap()
    calls: list[object] = []

    def lower(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre")
        return {**state_dict, "param_groups": [{**state_dict["param_groups"][0], "lr": 0.02}]}

    optimizer.register_load_state_dict_pre_hook(lower)
    optimizer.register_load_state_dict_post_hook(lambda optimizer: calls.append(optimizer.param_groups[0]["lr"]))
    state_dict = optimizer.state_dict()
    optimizer.load_state_dict(state_dict)
    assert calls == ["pre", 0.02]
    assert "rotograd" in state_dict
    assert state_dict["param_groups"][0]["lr"] == 0.1


def test_profiler_names_the_wrapped_optimizer() -> None:
    model, optimizer = wrap(adam)
    with torch.profiler.profile() as profile:
        train(model, optimizer, 0)
    names = [event.key for event in profile.key_averages()]
    assert names.count("Optimizer.step#Adam.step") == 1
    assert "Optimizer.step#RotoGradOptimizer.step" not in names
