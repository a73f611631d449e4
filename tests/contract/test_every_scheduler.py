"""Every learning-rate scheduler of torch works on the wrapper, the wrapped optimizer and the rotations."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from rotoopt import RotoGradOptimizer
from rotoopt.optimizer import DEFAULT_ROTATION_LR
from tests.contract.models import TwoTasks, assert_same, sgd, snapshot, train, wrap


def cycle(optimizer: Optimizer) -> dict[str, Any]:
    return {"max_lr": 0.2, "cycle_momentum": "momentum" in optimizer.defaults}


def halve(epoch: int) -> float:
    return 0.5**epoch


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5, total_iters=2)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, step_size_up=2, **cycle(o)),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, halve),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, halve),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, total_steps=10, **cycle(o)),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
}


def test_table_is_complete() -> None:
    members = {**vars(lr_scheduler), **vars(swa_utils)}
    found = {name for name, member in members.items() if inspect.isclass(member) and issubclass(member, LRScheduler)}
    assert found - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS), "torch has changed: update SCHEDULERS"


def advance(scheduler: LRScheduler) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(1.0)  # a loss that does not decrease
    else:
        scheduler.step()


def options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def run(model: TwoTasks, optimizer: RotoGradOptimizer, scheduler: LRScheduler, *batches: int) -> list[float]:
    """Train, and return the learning rates of the scheduled optimizer after every step."""
    rates = []
    for batch in batches:
        train(model, optimizer, batch)
        advance(scheduler)
        assert options(optimizer) == options(optimizer.optimizer)
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
    return rates


def rates_of_bare(name: str, lr: float, *, momentum: bool = True) -> list[float]:
    """Return the learning rates of a plain loop without a wrapper."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=lr, momentum=0.9) if momentum else Plain([weight], {"lr": lr})
    scheduler, rates = SCHEDULERS[name](optimizer), []
    for _ in range(6):
        optimizer.step()
        advance(scheduler)
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 1
    return rates


class Plain(Optimizer):
    """An optimizer without momentum, like that of the rotations."""

    def step(self, closure: Any = None) -> Any:
        pass


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("on_wrapper", [True, False], ids=["wrapper", "wrapped"])
def test_scheduler_of_the_network(name: str, on_wrapper: bool) -> None:
    model, optimizer = wrap()
    scheduler = SCHEDULERS[name](optimizer if on_wrapper else optimizer.optimizer)
    assert run(model, optimizer, scheduler, *range(6)) == rates_of_bare(name, 0.1)
    assert optimizer.rotation_optimizer.param_groups[0]["lr"] == DEFAULT_ROTATION_LR


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_of_the_rotations(name: str) -> None:
    model, optimizer = wrap()
    scheduler = SCHEDULERS[name](optimizer.rotation_optimizer)
    assert run(model, optimizer, scheduler, *range(6)) == rates_of_bare(name, DEFAULT_ROTATION_LR, momentum=False)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_is_resumed(name: str) -> None:
    model, optimizer = wrap()
    scheduler = SCHEDULERS[name](optimizer)
    run(model, optimizer, scheduler, *range(3))
    resumed_model, resumed = wrap()
    resumed_scheduler = SCHEDULERS[name](resumed)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # otherwise torch shares the tensors
    resumed_scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    rates = run(model, optimizer, scheduler, 3, 4, 5)
    assert run(resumed_model, resumed, resumed_scheduler, 3, 4, 5) == rates
    assert_same(snapshot(resumed_model, resumed), snapshot(model, optimizer))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_includes_added_groups(name: str) -> None:
    model, optimizer = wrap(lambda params: sgd(list(params)[:1]), num_tasks=2)
    optimizer.add_param_group({"params": list(model.heads.parameters()), "lr": 0.05})
    scheduler = SCHEDULERS[name](optimizer)
    rates = set()
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.step(*model.losses(batch, optimizer.rotate))
        advance(scheduler)
        assert options(optimizer) == options(optimizer.optimizer)
        rates.add(optimizer.optimizer.param_groups[1]["lr"])
    assert len(optimizer.param_groups) == 2
    assert len(rates) > 1
