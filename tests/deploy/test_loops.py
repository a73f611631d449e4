"""Training loops whose weights are those of the latest step, or belong to their rotations: nothing is reported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from rotoopt import RotoGradOptimizer
from tests.contract.models import TwoTasks, back_propagate, train, wrap
from tests.deploy.kept_weights import EVALUATIONS, TURNING, X, by_data, by_vector, evaluate, kept_of

Loop = Callable[[TwoTasks, RotoGradOptimizer, int], object]
seen: dict[str, Any] = {}


def load_the_best(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    if step == 3:
        seen["best"] = copy.deepcopy(model.state_dict())
    elif step % 7 == 6:
        model.load_state_dict(seen["best"])


def resume(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    if step == 3:
        seen["state"] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    elif step % 7 == 6:
        model.load_state_dict(seen["state"][0])
        optimizer.load_state_dict(seen["state"][1])


def average(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    averaged = seen.setdefault("averaged", AveragedModel(model))
    train(model, optimizer, step)
    averaged.update_parameters(model)
    optimizer.refresh(averaged)
    evaluate(averaged.module)


def accumulate(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    optimizer.backward(model.losses(step)[0])
    if step % 3 == 2:
        optimizer.step()
        optimizer.zero_grad()


def constrain(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    for param in model.heads.parameters():
        param.data.mul_(0.99)


def train_the_heads_twice(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    other = seen.setdefault("other", SGD(model.heads.parameters(), lr=0.01))
    train(model, optimizer, step)
    optimizer.zero_grad()
    with optimizer.paused():
        back_propagate(model.losses(step)[0])
    other.step()


def train_paused(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    if step % 2:
        train(model, optimizer, step)
    else:
        optimizer.zero_grad()
        with optimizer.paused():
            back_propagate(model.losses(step)[0])
        optimizer.step()


def swap_without_evaluation(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    params = list(model.parameters())
    stored = kept_of(params)
    by_data(params, [torch.zeros_like(each) for each in stored])
    by_vector(params, stored)


def restore_the_start(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    kept = seen.setdefault("start", kept_of(list(model.parameters())))
    train(model, optimizer, step)
    if step % 7 == 6:
        by_data(list(model.parameters()), kept)


def diverge(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    if step == 5:
        by_data(list(model.parameters()), [each * torch.nan for each in model.parameters()])
        train(model, optimizer, step)


def cast(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    if step == 5:
        with torch.no_grad():
            model.bfloat16()(X.bfloat16())
        model.float()


def schedule(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    scheduler = seen.setdefault("scheduler", torch.optim.lr_scheduler.StepLR(optimizer, 3))
    train(model, optimizer, step)
    scheduler.step()


LEGITIMATE: dict[str, tuple[Loop, dict[str, Any]]] = {
    "validation": (train, TURNING),
    "load_state_dict": (load_the_best, TURNING),
    "resume": (resume, TURNING),
    "AveragedModel": (average, TURNING),
    "accumulation": (accumulate, TURNING),
    "constraint": (constrain, TURNING),
    "another optimizer": (train_the_heads_twice, TURNING),
    "paused": (train_paused, TURNING),
    "swap without evaluation": (swap_without_evaluation, TURNING),
    "NaN": (diverge, TURNING),
    "cast": (cast, TURNING),
    "scheduler": (schedule, TURNING),
    "rotate=False": (restore_the_start, {"rotate": False}),
    "no updates": (restore_the_start, {"rotation_lr": 0.0}),
    "one task is not rotated": (train, {**TURNING, "rotate": [True, False]}),
}


@pytest.mark.parametrize("kind", EVALUATIONS)
@pytest.mark.parametrize("name", LEGITIMATE)
def test_other_loops_are_not_reported(name: str, kind: str) -> None:
    loop, options = LEGITIMATE[name]
    seen.clear()
    model, optimizer = wrap(**options)
    for step in range(20):
        loop(model, optimizer, step)
        evaluate(model, kind)
        evaluate(model, kind)
