"""The method follows the representation to its device, and never makes the host wait for it.

The device is "meta", where tensors have a shape but no values: copying a number to the host, as
``.item()`` or ``if tensor:`` do on a GPU, raises there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.testing import assert_close

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer
from rotoopt.optimizer import TURN_EVERY

K, META = 3, torch.device("meta")
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "EqualWeighting": lambda: {"weighting": EqualWeighting()},
    "GradNorm": lambda: {"weighting": GradNorm()},
    "callable": lambda: {"weighting": lambda grads: grads.mean(0)},
    "normalize_losses": lambda: {"normalize_losses": True},
    "rotation_size": lambda: {"rotation_size": 5},
    "haar": lambda: {"init": "haar", "rotation_size": 5},
    "rotate": lambda: {"rotate": [True, False, True]},
    "rotate=False": lambda: {"rotate": False},
    "Adam": lambda: {"rotation_optimizer": partial(Adam, lr=0.1), "rotation_size": 8},
}


@pytest.fixture(params=[None, 1], ids=["as it ships", "turns in every step"])
def turn_every(request: pytest.FixtureRequest) -> int | None:
    every: int | None = request.param
    return every


def wrap(options: str, turn_every: int | None = 1) -> RotoGradOptimizer:
    return RotoGradOptimizer(
        SGD([nn.Parameter(torch.zeros(2))], lr=0.1), num_tasks=K, turn_every=turn_every, **OPTIONS[options]()
    )


def step(optimizer: RotoGradOptimizer, device: torch.device, *, absent: int | None = None) -> None:
    rep = torch.randn(4, 8, device=device, requires_grad=True)
    losses = [rotated.square().sum() for rotated in optimizer.rotate(rep)]
    optimizer.zero_grad()
    optimizer.backward([None if task == absent else loss for task, loss in enumerate(losses)], rep)
    optimizer.step()


def tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state dict, except the number of steps, which torch keeps on the host."""
    if isinstance(tree, Tensor) and not path.endswith(".step"):
        yield path, tree
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from tensors(value, f"{path}.{key}")


def assert_all_on(device: torch.device, optimizer: RotoGradOptimizer) -> None:
    found = dict(tensors(optimizer.state_dict()["rotograd"]))
    assert len(found) > 4
    assert {path for path, tensor in found.items() if tensor.device != device} == set()
    record = optimizer.last_step
    assert record is not None
    assert record.alignment.device == device
    assert optimizer.task_weights.device == device


@pytest.mark.parametrize("num_before", [0, 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_waits_for_the_device(options: str, num_before: int, turn_every: int | None) -> None:
    optimizer = wrap(options, turn_every)
    for _ in range(num_before):
        step(optimizer, torch.device("cpu"))
    for absent in (None, 1, None):
        step(optimizer, META, absent=absent)
    assert_all_on(META, optimizer)


@pytest.mark.parametrize("options", OPTIONS)
def test_loaded_state_follows_the_representation(options: str, turn_every: int | None) -> None:
    saved, optimizer = wrap(options, turn_every), wrap(options, turn_every)
    for _ in range(2):
        step(saved, torch.device("cpu"))
    optimizer.load_state_dict(saved.state_dict())
    step(optimizer, META)
    assert_all_on(META, optimizer)


def test_forward_under_inference_mode_creates_tensors_for_training() -> None:
    optimizer = wrap("rotation_size")
    step(optimizer, torch.device("cpu"))
    with torch.inference_mode():
        optimizer.rotate(torch.randn(4, 8, device=META))
    step(optimizer, META)
    assert_all_on(META, optimizer)


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_on_a_gpu_are_those_on_the_cpu(options: str) -> None:
    matrices = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        optimizer = wrap(options)
        grads = torch.randn(3, K, 4, 8)
        for batch in grads:
            rep = torch.zeros(4, 8, device=device, requires_grad=True)
            rotated = optimizer.rotate(rep)
            losses = [(r * grad.to(device)).sum() + 1 for r, grad in zip(rotated, batch, strict=True)]
            optimizer.step(losses, rep)
        matrices.append(optimizer.rotations.matrices.cpu())
    torch.testing.assert_close(*matrices, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("options", [{"init": "haar"}, {"init": "identity"}, {"rotate": False}], ids=str)
def test_the_default_device_may_be_another_one(options: dict[str, Any]) -> None:
    """As after torch.set_default_device("cuda") for a model on the CPU, on which its state is compared."""
    results = []
    for default in (torch.device("cpu"), META):
        torch.manual_seed(0)
        backbone, heads = nn.Linear(5, 6), nn.ModuleList(nn.Linear(6, 2) for _ in range(2))
        model, x = nn.ModuleList([backbone, heads]), torch.randn(4, 5)
        with default:
            optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), heads, rotation_lr=0.3, **options)
            for _ in range(TURN_EVERY + 2):
                optimizer.zero_grad()
                optimizer.step([(head(backbone(x)) - 1).square().mean() for head in heads])
            model.load_state_dict(copy.deepcopy(model.state_dict()))
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.fold()
        results.append([*model.parameters(), optimizer.task_weights])
    assert_close(results[1], results[0])
