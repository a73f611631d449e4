"""The warning about harmful rotations: it is issued if there is a reason, and only then."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from rotoopt import RotoGradOptimizer
from rotoopt.diagnostics import History, _history
from rotoopt.diagnostics._harm import WINDOW, harm
from rotoopt.diagnostics._history import _network_lr
from tests.contract.models import train, wrap
from tests.diagnostics.fakes import FakeOptimizer

K, NUM_RUNS = 3, 200
PAIRS = [(0, 1), (0, 2), (1, 2)]
MEMORY = 0.9  # of the noise, per step
ROTATION_LR, BELOW, ABOVE = 1e-3, 1e-2, 1e-4  # learning rate of the network; that of the rotations is lower or higher
RISE = torch.linspace(0, 1, WINDOW)


def noise(*shape: int) -> Tensor:
    """Return noise of variance one with a correlation time of about 10 steps along the first dimension."""
    fresh = torch.randn(shape) * math.sqrt(1 - MEMORY**2)
    series = [torch.randn(shape[1:])]
    for now in fresh[1:]:
        series.append(MEMORY * series[-1] + now)
    return torch.stack(series)


def windows(cosine: Tensor, loss: Tensor, turn: float, size: float) -> Iterator[dict[str, Tensor]]:
    """Yield windows with these cosines and losses (T,), plus noise of this size."""
    pair_noise, loss_noise = size * noise(WINDOW, NUM_RUNS, K), size * noise(WINDOW, NUM_RUNS, K)
    for run in range(NUM_RUNS):
        cosines = torch.eye(K).repeat(WINDOW, 1, 1)
        for column, (i, j) in enumerate(PAIRS):
            cosines[:, i, j] = cosines[:, j, i] = cosine + pair_noise[:, run, column]
        yield {
            "cosines": cosines,
            "losses": torch.logspace(-3, 3, K) * (loss[:, None] + loss_noise[:, run]),
            "angles": torch.tensor([0.0, 0.2, 1.0]) * turn / WINDOW * torch.ones(WINDOW, 1),
            "rotation_lr": torch.full((WINDOW,), ROTATION_LR),
            "step": torch.arange(WINDOW),
        }


@dataclass(frozen=True)
class Case:
    warnings: bool
    cosine: Tensor = 0 * RISE
    loss: Tensor = 1 + 0 * RISE
    turn: float = 2.0
    size: float = 0.2
    network_lr: float = BELOW
    says: str = ""


CASES = {
    "noise": Case(False),
    "cosines fall": Case(
        True, cosine=0.7 - 0.7 * RISE, says=r"mean cosine between task gradients fell from 0\.\d\d to 0\.\d\d"
    ),
    "cosines fall, rotations hardly turn": Case(False, cosine=0.7 - 0.7 * RISE, turn=0.4),
    "cosines fall, rotations rest": Case(False, cosine=0.7 - 0.7 * RISE, turn=0.0, network_lr=ABOVE),
    "cosines fall a little": Case(False, cosine=0.1 - 0.04 * RISE, size=0.001),
    "cosines rise": Case(False, cosine=0.5 * RISE),
    "losses rise": Case(True, loss=1 + 0.8 * RISE, says="the losses rose by .*%"),
    "losses below zero rise": Case(True, loss=-2 + 0.8 * RISE, size=0.1, says="the losses rose by .*%"),
    "losses rise, rotations hardly turn": Case(False, loss=1 + 0.8 * RISE, turn=0.4),
    "losses rise a little": Case(False, loss=1 + 0.08 * RISE, size=0.001),
    "losses fall": Case(False, loss=2 - RISE),
    "learning rate above the network's, for nothing": Case(
        True,
        network_lr=ABOVE,
        cosine=-0.02 * RISE,
        size=1e-3,
        says=r"did not rise.* 0\.001, above the network's 0\.0001\.",
    ),
    "learning rate above the network's, cosines rise": Case(False, cosine=0.5 * RISE, network_lr=ABOVE),
    "learning rate above the network's, rotations rest": Case(False, turn=0.4, network_lr=ABOVE),
    "learning rate of the network unknown": Case(False, network_lr=math.nan),
}


@pytest.mark.parametrize("name", CASES)
def test_warns_in_all_of_many_runs_or_in_none(name: str) -> None:
    case = CASES[name]
    found = [
        harm(values, network_lr=case.network_lr) for values in windows(case.cosine, case.loss, case.turn, case.size)
    ]
    assert [warning is not None for warning in found] == [case.warnings] * NUM_RUNS
    if case.warnings:
        for warning in found:
            assert warning is not None
            assert "turned by up to 2.0 radians from step 0 to step 999" in warning
            assert re.search(case.says, warning)
            assert "rotate=False" in warning


def test_changing_tasks_are_no_fall() -> None:
    """With more tasks in a batch, unrelated gradients are less aligned with their mean: 0.71 for 2, 0.58 for 3."""
    for values in windows(0 * RISE, 1 + 0 * RISE, turn=2.0, size=0.001):
        values["cosines"][:, 0, 1] = values["cosines"][:, 1, 0] = 0.9
        values["cosines"][: WINDOW // 2, 2] = values["cosines"][: WINDOW // 2, :, 2] = torch.nan
        values["losses"][: WINDOW // 2, 2] = torch.nan
        assert harm(values, network_lr=BELOW) is None


def test_steps_that_are_not_finite_are_ignored() -> None:
    for values in windows(0 * RISE, 1 + 0.8 * RISE, turn=2.0, size=0.1):
        values["cosines"][::7] = torch.nan
        values["losses"][::7] = torch.inf
        assert re.search("the losses rose by .*%", harm(values, network_lr=BELOW) or "")


def test_one_task_gives_no_warning() -> None:
    for values in windows(0 * RISE, 1 + 0 * RISE, turn=2.0, size=0.1):
        alone = values | {"cosines": values["cosines"][:, :1, :1], "losses": values["losses"][:, :1]}
        assert harm(alone, network_lr=ABOVE) is None


def test_history_warns_once_by_the_latest_records() -> None:
    """From step 500 on, rotations turn and cosines fall: 1.08 radians until step 1399."""
    recorded, optimizer = History(), FakeOptimizer(["a", "b"], lr=0.5)  # some other parameters have half of it
    for step in range(3 * WINDOW):
        cosine, angle = 1 - max(0, step - 500) / WINDOW, 12e-4 * (step >= 500)
        cosines = torch.tensor([[1.0, cosine], [cosine, 1.0]])
        latest = optimizer.step(angles=torch.full((2,), angle), cosines=cosines, rotation_lr=0.4)
        if step == 1399:
            with pytest.warns(UserWarning, match=r"1\.1 radians from step 400 to step 1399, while the mean") as caught:
                recorded.record(latest)
            assert [warning.filename for warning in caught] == [__file__]
            assert "above" not in str(caught[0].message)
        else:
            recorded.record(latest)


def train_and_record(steps: int, **options: Any) -> None:
    model, optimizer = wrap(**options)
    recorded = History()
    for batch in range(steps):
        train(model, optimizer, batch)
        recorded.record(optimizer)


def test_only_rotations_at_a_high_rate_give_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_history, "WINDOW", 200)
    harmless: list[dict[str, Any]] = [{}, {"rotate": False}, {"init": "haar", "rotation_lr": 0.01}]
    for options in harmless:
        train_and_record(300, **options)
    with pytest.warns(UserWarning, match="learning rate is 0.2, above the network's 0.1") as caught:
        train_and_record(300, rotation_optimizer=partial(Adam, lr=0.2))
    assert len(caught) == 1


def test_learning_rates_are_compared_if_they_have_the_same_unit() -> None:
    """The learning rate of the built-in step has another unit."""
    heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
    bare = torch.optim.SGD(heads.parameters(), lr=0.5)
    optimizer = RotoGradOptimizer(bare, heads)
    assert math.isnan(_network_lr(optimizer))
    optimizer.remove()
    other = RotoGradOptimizer(bare, heads, rotation_optimizer=lambda params: torch.optim.Adam(params, lr=1e-4))
    assert _network_lr(other) == 0.5
