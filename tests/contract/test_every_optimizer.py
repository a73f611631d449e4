"""Every optimizer of torch.optim can be wrapped, and for a single task the wrapper changes nothing."""

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from rotoopt import RotoGradOptimizer
from tests.contract.models import TwoTasks, assert_same, back_propagate, parameters

ARGUMENTS: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.01},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.01},
    "Adagrad": {"lr": 0.01},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "LBFGS": {"lr": 0.1, "max_iter": 3},  # through a closure, which it evaluates several times
    "Muon": {"lr": 0.01},  # for matrices only, and all parameters of the model are
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "RMSprop": {"lr": 0.01},
    "Rprop": {"lr": 0.01},
    "SGD": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    "SparseAdam": {"lr": 0.01},  # for sparse gradients only: an embedding as backbone, and frozen heads
}
if not hasattr(torch.optim, "Muon"):  # before torch 2.9
    del ARGUMENTS["Muon"]


def classes() -> dict[str, type[Optimizer]]:
    members: dict[str, Any] = dict(inspect.getmembers(torch.optim, inspect.isclass))
    return {name: found for name, found in members.items() if issubclass(found, Optimizer) and found is not Optimizer}


def test_table_is_complete() -> None:
    assert sorted(classes()) == sorted(ARGUMENTS), "torch.optim has changed: update ARGUMENTS"


def build(name: str) -> tuple[TwoTasks, Optimizer]:
    torch.manual_seed(0)
    model = TwoTasks(sparse=name == "SparseAdam")
    if name == "SparseAdam":
        model.heads.requires_grad_(False)
    trainable = [param for param in model.parameters() if param.requires_grad]
    return model, classes()[name](trainable, **ARGUMENTS[name])


def run(model: TwoTasks, optimizer: Optimizer, *, num_losses: int) -> list[float]:
    """Train for five steps and return the sums of the losses."""

    def evaluate(batch: int) -> float:
        optimizer.zero_grad()
        return back_propagate(model.losses(batch)[0][:num_losses])

    return [optimizer.step(partial(evaluate, batch)) for batch in range(5)]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_two_tasks(name: str) -> None:
    model, inner = build(name)
    before = parameters(model)
    optimizer = RotoGradOptimizer(inner, heads=model.heads, turn_every=1)
    sums = run(model, optimizer, num_losses=2)
    bare_model, bare = build(name)
    assert sums[0] == run(bare_model, bare, num_losses=2)[0]

    assert all(value < 1e3 for value in sums)
    moved = [not torch.equal(now, then) for now, then in zip(parameters(model), before, strict=True)]
    assert moved == [param.requires_grad for param in model.parameters()]
    assert not torch.equal(optimizer.rotations.matrices, torch.eye(6).expand(2, 6, 6))
    assert keys(inner) == keys(bare)
    assert optimizer.state is inner.state
    assert optimizer.state_dict()["rotograd"]["num_steps"] == 5


def keys(optimizer: Optimizer) -> list[list[str]]:
    """Return the keys of the state of each parameter."""
    params: list[Tensor] = [param for group in optimizer.param_groups for param in group["params"]]
    assert set(optimizer.state) <= set(params)
    return [sorted(optimizer.state[param]) if param in optimizer.state else [] for param in params]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_single_task_is_the_bare_optimizer(name: str) -> None:
    bare_model, bare = build(name)
    model, inner = build(name)
    optimizer = RotoGradOptimizer(inner, heads=[model.heads["left"]])
    assert run(model, optimizer, num_losses=1) == run(bare_model, bare, num_losses=1)
    assert_same(parameters(model), parameters(bare_model))
    state_dict = optimizer.state_dict()
    del state_dict["rotograd"]
    assert_same(state_dict, bare.state_dict())
