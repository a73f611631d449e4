"""The wrapper is a torch optimizer, and a transparent one: it exposes the state of the wrapped one."""

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer

from rotoopt import GradNorm, RotoGradOptimizer
from tests.contract.models import TwoTasks, adam, assert_moved, assert_same, parameters, sgd, snapshot, train, wrap


def loaded(optimizer: RotoGradOptimizer) -> RotoGradOptimizer:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def with_group(optimizer: RotoGradOptimizer) -> RotoGradOptimizer:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.5})
    return optimizer


def saved_whole(optimizer: RotoGradOptimizer) -> RotoGradOptimizer:
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    result: RotoGradOptimizer = torch.load(buffer, weights_only=False)
    return result


AFTER: dict[str, Callable[[RotoGradOptimizer], RotoGradOptimizer]] = {
    "construction": lambda optimizer: optimizer,
    "load_state_dict": loaded,
    "add_param_group": with_group,
    "deepcopy": copy.deepcopy,
    "pickle": saved_whole,
}


@pytest.mark.parametrize("name", AFTER)
def test_views(name: str) -> None:
    model, optimizer = wrap(adam)
    train(model, optimizer, 0, 1)
    optimizer = AFTER[name](optimizer)
    assert isinstance(optimizer, Optimizer)
    inner = optimizer.optimizer
    assert type(inner) is Adam
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert len(optimizer.param_groups) == (2 if name == "add_param_group" else 1)
    for view in ("param_groups", "state", "defaults"):
        value = copy.copy(getattr(inner, view))
        setattr(optimizer, view, value)
        assert getattr(inner, view) is value


def test_wrapping_an_optimizer_after_steps_keeps_its_state() -> None:
    model, unused = wrap(adam)
    train(model, unused, 0, 1)
    unused.remove()
    warm = unused.optimizer
    before = copy.deepcopy(warm.state_dict())
    optimizer = RotoGradOptimizer(warm, heads=model.heads)
    assert_same(warm.state_dict(), before)
    train(model, optimizer, 2)
    assert all(state["step"] == 3 for state in optimizer.state.values())


class TwoModes(SGD):
    """As of schedule-free optimizers, and those that split a step, such as SAM."""

    mode = "train"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    def first_step(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("name", AFTER)
def test_modes_of_the_wrapped_optimizer(name: str) -> None:
    """Accelerate and the Trainer of Hugging Face look for them."""
    optimizer: Any = AFTER[name](wrap(lambda params: TwoModes(params, lr=0.1))[1])
    for mode in ("eval", "train"):
        getattr(optimizer, mode)()
        assert optimizer.optimizer.mode == mode
        assert not hasattr(wrap(sgd)[1], mode)
    with pytest.raises(AttributeError, match=r"optimizer\.optimizer\.first_step.*call optimizer\.step\(closure\)"):
        optimizer.first_step()
    with pytest.raises(AttributeError, match=r"'RotoGradOptimizer' object has no attribute 'third_step'$"):
        optimizer.third_step()


def test_repr_names_tasks_and_the_wrapped_optimizer() -> None:
    _, optimizer = wrap(adam, weighting=GradNorm(alpha=0.5))
    text = repr(optimizer)
    for part in ("RotoGradOptimizer", "left, right", "GradNorm(alpha=0.5)", "size=None", "Adam (", "lr: 0.01"):
        assert part in text
    assert "heads[0], heads[1]" in repr(wrap(heads=list(TwoTasks().requires_grad_(False).heads.values()))[1])
    assert "task 0, task 1" in repr(wrap(num_tasks=2)[1])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_parameters_and_rotations(set_to_none: bool) -> None:
    assert inspect.signature(RotoGradOptimizer.zero_grad).parameters["set_to_none"].default is True
    model, optimizer = wrap(lambda params: SGD(params, lr=0.1), weighting=GradNorm(alpha=1.5))
    train(model, optimizer, 0)
    optimizer.backward(*model.losses(1))
    optimizer.zero_grad(set_to_none)
    for param in model.parameters():
        assert (param.grad is None) if set_to_none else not param.grad.any()  # type: ignore[union-attr]
    before = snapshot(model, optimizer)
    optimizer.step()
    assert_same(snapshot(model, optimizer), before)


def test_gradients_of_a_skipped_step_are_not_used_later() -> None:
    """GradScaler skips a step when a gradient overflows."""
    (model, optimizer), (expected_model, expected) = wrap(burn_in_period=0), wrap(burn_in_period=0)
    train(model, optimizer, 0)
    train(expected_model, expected, 0)
    optimizer.backward(*model.losses(7))
    optimizer.zero_grad()
    train(model, optimizer, 1, 2)
    train(expected_model, expected, 1, 2)
    assert_same(snapshot(model, optimizer), snapshot(expected_model, expected))


def test_maximize_of_the_negative() -> None:
    model, optimizer = wrap(weighting=GradNorm(alpha=0.0), turn_every=1)
    negative_model, negative = wrap(
        lambda params: SGD(params, lr=0.1, momentum=0.9, maximize=True), weighting=GradNorm(0.0), turn_every=1
    )
    before = snapshot(*wrap(rotation_size=6))
    for batch in range(3):
        train(model, optimizer, batch)
        negative.zero_grad()
        negative.step([-loss for loss in negative_model.losses(batch)[0]])
    assert_moved(model, optimizer, before)
    assert_same(parameters(negative_model), parameters(model))
    assert_same(negative.rotations.matrices, optimizer.rotations.matrices)


class Proxy:
    """The proxy of Lightning: a subclass of the optimizer's class that reads from it, and stores what is written."""

    def __init__(self, optimizer: RotoGradOptimizer) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def test_works_behind_a_proxy() -> None:
    model, optimizer = wrap()
    expected_model, expected = wrap()
    proxy_class = type("ProxyOfRotoGradOptimizer", (Proxy, RotoGradOptimizer), {})
    proxy = proxy_class(optimizer)
    for batch in range(2):
        train(expected_model, expected, batch)
        optimizer.zero_grad()
        proxy.backward(*model.losses(batch))
        optimizer.step(None)
    assert_same(snapshot(model, optimizer), snapshot(expected_model, expected))


def test_step_can_be_replaced_on_the_instance() -> None:
    """As Accelerate does, to detect whether GradScaler has skipped a step."""
    model, optimizer = wrap()
    before = snapshot(model, optimizer)
    original, calls = optimizer.step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    optimizer.step = counted  # type: ignore[method-assign]
    train(model, optimizer, 0)
    optimizer.step = original  # type: ignore[method-assign]
    train(model, optimizer, 1)
    assert len(calls) == 1
    assert optimizer.state_dict()["rotograd"]["num_steps"] == 2
    assert not torch.equal(parameters(model)[0], before["parameters"][0])
