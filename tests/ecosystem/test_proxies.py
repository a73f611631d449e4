"""How Lightning, Accelerate and the Hugging Face Trainer use an optimizer, tested without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer
from tests.contract.models import TwoTasks, adam, assert_moved, assert_same, back_propagate, snapshot, train, wrap

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "every step": lambda: {"turn_every": 1},
    "GradNorm": lambda: {"weighting": GradNorm(), "normalize_losses": True, "burn_in_period": 2},
    "EqualWeighting": lambda: {"weighting": EqualWeighting(), "rotation_size": 4},
    "Adam": lambda: {"rotation_optimizer": Adam},
}


class Proxy:
    """Like that of Lightning: a subclass of the optimizer's class, so methods run with the proxy as ``self``."""

    def __init__(self, optimizer: RotoGradOptimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (Proxy, type(optimizer)), {})

    @property
    def optimizer(self) -> RotoGradOptimizer:
        return self._optimizer

    def step(self, closure: Callable[[], float] | None = None, **kwargs: Any) -> float | None:
        return self._optimizer.step(closure=closure or (lambda: 0.0), **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def call_backward(model: TwoTasks, optimizer: Any) -> None:
    optimizer.zero_grad()
    optimizer.backward(*model.losses(2))
    optimizer.step()


def call_step(model: TwoTasks, optimizer: Any) -> None:
    losses, rep = model.losses(2)
    optimizer.zero_grad()
    optimizer.step(losses=losses, rep=rep)


def forget_gradients(model: TwoTasks, optimizer: Any) -> None:
    optimizer.backward(*model.losses(2))
    optimizer.zero_grad()
    optimizer.step()


def pause(model: TwoTasks, optimizer: Any) -> object:
    with optimizer.paused():
        losses, rep = model.losses(2)
    return torch.autograd.grad(losses[0], [rep])


def add_group(model: TwoTasks, optimizer: Any) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5})


def set_attributes(model: TwoTasks, optimizer: Any) -> None:
    optimizer.param_groups = [{**group, "lr": 0.5} for group in optimizer.param_groups]
    optimizer.defaults = {**optimizer.defaults, "lr": 0.5}
    optimizer.state = copy.copy(optimizer.state)


def save_and_load(model: TwoTasks, optimizer: Any) -> None:
    state_dict = copy.deepcopy(optimizer.state_dict())
    call_backward(model, optimizer)
    optimizer.load_state_dict(state_dict)


def no_proxy(optimizer: RotoGradOptimizer) -> RotoGradOptimizer:
    return optimizer


USES: list[Any] = [
    call_backward,
    call_step,
    forget_gradients,
    pause,
    add_group,
    set_attributes,
    save_and_load,
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("use", USES)
def test_proxy_acts_on_the_original(use: Callable[[TwoTasks, Any], object], options: str) -> None:
    results = []
    for wrapper in (no_proxy, Proxy):
        model, optimizer = wrap(adam, **OPTIONS[options]())
        train(model, optimizer, 0, 1)
        user: Any = wrapper(optimizer)
        result = use(model, user)
        after = snapshot(model, optimizer)
        train(model, optimizer, 3)  # attributes written to the proxy would be missing here
        results.append((result, after, snapshot(model, optimizer), optimizer.defaults))
        assert user is optimizer or vars(user) == {"_optimizer": optimizer}
    assert_same(*results)


@pytest.mark.parametrize("use", [call_backward, save_and_load])
def test_hooks_run_once(use: Callable[[TwoTasks, Any], object]) -> None:
    kinds = [f"{what}_{when}" for what in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")]
    calls: dict[Any, list[str]] = {no_proxy: [], Proxy: []}
    for wrapper, noted in calls.items():
        model, optimizer = wrap(adam)
        user = wrapper(optimizer)
        for kind in kinds:
            getattr(user, f"register_{kind}_hook")(lambda *_, noted=noted, kind=kind: noted.append(kind))
        use(model, user)
    assert calls[Proxy] == calls[no_proxy]
    assert set(calls[Proxy]) == set(kinds if use is save_and_load else kinds[:2])


def test_removal_through_a_proxy() -> None:
    model, optimizer = wrap(init="haar")
    train(model, optimizer, 0)
    Proxy(optimizer).remove()
    assert all(not head._forward_pre_hooks for head in model.heads.values())


def test_proxy_exposes_the_original() -> None:
    model, optimizer = wrap(weighting=GradNorm())
    train(model, optimizer, 0)
    proxy: Any = Proxy(optimizer)
    assert isinstance(proxy, Optimizer)
    assert isinstance(proxy, RotoGradOptimizer)
    for name in ("param_groups", "state", "defaults", "rotations", "rotation_optimizer", "last_step", "task_weights"):
        assert getattr(proxy, name) is getattr(optimizer, name), name
    assert repr(proxy) == "Lightning" + repr(optimizer)
    with pytest.raises(TypeError, match="must be the optimizer to wrap, got a RotoGradOptimizer"):
        RotoGradOptimizer(proxy, heads=model.heads)


def rebuilt(state: Any) -> Any:
    """Return a copy as Accelerate makes it to move a state dict to a device."""
    if isinstance(state, list | tuple):
        return type(state)(rebuilt(each) for each in state)
    if isinstance(state, dict):
        return type(state)({key: rebuilt(value) for key, value in state.items()})
    return state.clone() if isinstance(state, Tensor) else state


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_loading_the_own_state_dict_changes_nothing(options: str, num_steps: int) -> None:
    """Accelerate does this when it prepares the optimizer, also before the first step."""
    pairs = [wrap(adam, **OPTIONS[options]()) for _ in range(2)]
    for pair in pairs:
        train(*pair, *range(num_steps))
    optimizer = pairs[0][1]
    state_dict = rebuilt(optimizer.state_dict())
    assert_same(state_dict, optimizer.state_dict())
    optimizer.load_state_dict(state_dict)
    assert_same(optimizer.state_dict(), state_dict)
    for pair in pairs:
        train(*pair, 10, 11)
    assert_same(snapshot(*pairs[0]), snapshot(*pairs[1]))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_cleared_by_the_model(options: str) -> None:
    """The Hugging Face Trainer calls zero_grad() of the model, never that of the optimizer."""
    results = []
    for by_model in (False, True):
        model, optimizer = wrap(adam, **OPTIONS[options]())
        for batch in range(0, 6, 2):
            for part in (batch, batch + 1):
                optimizer.backward(*model.losses(part))
            optimizer.step()
            (model if by_model else optimizer).zero_grad()
        results.append(snapshot(model, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("scheduled", [False, True])
def test_step_is_replaced_for_a_while(scheduled: bool) -> None:
    """Accelerate does this in every step, to detect whether the scaler skips it, and passes None by position."""
    pairs = [wrap(adam, turn_every=1) for _ in range(2)]
    before = snapshot(*wrap(rotation_size=6))
    schedulers = [StepLR(optimizer, 1) for _, optimizer in pairs] if scheduled else []
    model, optimizer = pairs[0]
    scaler, original, calls = GradScaler("cpu", init_scale=8.0), optimizer.step, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    for batch in range(3):
        optimizer.zero_grad()
        back_propagate([scaler.scale(loss) for loss in model.losses(batch)[0]])
        optimizer.step = counted  # type: ignore[method-assign]
        scaler.step(optimizer, None)
        optimizer.step = original  # type: ignore[method-assign]
        scaler.update()
        pairs[1][1].zero_grad()
        back_propagate([8 * loss for loss in pairs[1][0].losses(batch)[0]])
        for param in pairs[1][0].parameters():
            assert param.grad is not None
            param.grad /= 8
        pairs[1][1].step()
        for scheduler in schedulers:
            scheduler.step()
    assert calls == 3
    assert_moved(model, optimizer, before)
    assert_same(snapshot(model, optimizer), snapshot(*pairs[1]))

    copied_model, copied = copy.deepcopy((model, optimizer))  # the replaced `step` must not be copied
    train(copied_model, copied, 3)
    assert_same(snapshot(model, optimizer), snapshot(*pairs[1]))
    train(model, optimizer, 3)
    assert_same(snapshot(copied_model, copied), snapshot(model, optimizer))
