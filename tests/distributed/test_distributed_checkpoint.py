"""torch.distributed.checkpoint: saving has no side effects, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from rotoopt import GradNorm, RotoGradOptimizer
from tests.contract.models import Make, TwoTasks, adam, assert_same, parameters, sgd, snapshot, train, wrap
from tests.distributed.ranks import Ranks

# Warnings of torch itself, without a process group.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "GradNorm": {"weighting": GradNorm},
    "Adam": {"rotation_optimizer": torch.optim.Adam},
    "rotation_size": {"rotation_size": 4},
}


def make(options: str) -> tuple[TwoTasks, RotoGradOptimizer]:
    chosen = {key: value() if key == "weighting" else value for key, value in OPTIONS[options].items()}
    return wrap(adam, burn_in_period=4, **chosen)


def entries(model: TwoTasks, optimizer: RotoGradOptimizer) -> dict[str, Any]:
    network, optim = get_state_dict(model, optimizer)
    return {"network": network, "optimizer": optim, "rotograd": optimizer.rotograd_state}


def save(model: TwoTasks, optimizer: RotoGradOptimizer, folder: Path) -> None:
    state_dict_saver.save(entries(model, optimizer), checkpoint_id=folder)


def load(model: TwoTasks, optimizer: RotoGradOptimizer, folder: Path) -> None:
    state = entries(model, optimizer)
    state_dict_loader.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["network"], optim_state_dict=state["optimizer"])


@pytest.mark.parametrize("num_steps", [0, 2, 6])
@pytest.mark.parametrize("options", OPTIONS)
def test_resume(options: str, num_steps: int, tmp_path: Path) -> None:
    model, optimizer = make(options)
    train(model, optimizer, *range(num_steps))
    save(model, optimizer, tmp_path)
    resumed_model, resumed = make(options)
    train(resumed_model, resumed, *range(100, 100 + 3 * (num_steps > 0)))  # all of this is overwritten
    load(resumed_model, resumed, tmp_path)
    for each_model, each in ((model, optimizer), (resumed_model, resumed)):
        train(each_model, each, 20, 21, 22)
    assert_same(snapshot(resumed_model, resumed), snapshot(model, optimizer))


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("make_bare", [adam, sgd, torch.optim.SGD])
def test_getting_and_setting_have_no_side_effects(make_bare: Make, num_steps: int) -> None:
    """Torch initializes missing moments by a step with zero gradients, which must not warn or update rotations."""
    model, optimizer = wrap(make_bare)
    train(model, optimizer, *range(num_steps))
    before = parameters(model), copy.deepcopy(optimizer.state_dict()["rotograd"])
    for _ in range(3):
        state = get_state_dict(model, optimizer)
        optimizer.rotograd_state.load_state_dict(optimizer.rotograd_state.state_dict())
        set_optimizer_state_dict(model, optimizer, state[1])
    assert_same((parameters(model), optimizer.state_dict()["rotograd"]), before)


def test_setting_without_the_entry_warns_and_names_it() -> None:
    model, optimizer = wrap(adam)
    train(model, optimizer, 0)
    _, optim = get_state_dict(model, optimizer)
    with pytest.warns(UserWarning, match=r"without\..*torch.distributed.checkpoint: save and load optimizer.rotograd_"):
        set_optimizer_state_dict(model, optimizer, optim)
    optimizer.rotograd_state.load_state_dict(optimizer.rotograd_state.state_dict())
    set_optimizer_state_dict(model, optimizer, optim)  # loaded first, as recommended
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match="should have an entry 'rotograd'"):
        set_optimizer_state_dict(model, optimizer, optim)


def test_state_that_does_not_fit_is_rejected() -> None:
    (_, saved), (model, optimizer) = wrap(rotation_size=4), wrap(rotation_size=5)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="must have rotations of 5 features, got 4"):
        optimizer.rotograd_state.load_state_dict(saved.rotograd_state.state_dict())
    assert_same(snapshot(model, optimizer), before)


def resume_sharded(rank: int, folder: Path) -> list[Any]:
    """Train under FSDP2, save, load into a new run, and continue both."""
    results, runs = [], []
    for _ in range(2):
        model = TwoTasks()
        torch.manual_seed(0)
        for param in model.parameters():
            torch.nn.init.normal_(param, std=0.5)
        for module in (model.backbone, *model.heads.values()):
            fully_shard(module)
        fully_shard(model)
        bare = torch.optim.Adam(model.parameters(), lr=0.01)
        runs.append((model, RotoGradOptimizer(bare, heads=model.heads, rotation_lr=0.05, turn_every=1)))
    train(*runs[0], *range(4))
    save(*runs[0], folder)
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(*runs[1], folder)
    for model, optimizer in runs:
        train(model, optimizer, 20, 21)
        full = [param.full_tensor().detach() for param in model.parameters()]  # type: ignore[attr-defined]
        results.append((full, optimizer.state_dict()["rotograd"]))
    return results


@pytest.mark.distributed
def test_resume_sharded(ranks: Ranks, tmp_path: Path) -> None:
    for uninterrupted, resumed in ranks.run(resume_sharded, tmp_path):
        assert_same(resumed, uninterrupted)
