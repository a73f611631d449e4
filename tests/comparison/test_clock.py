"""The clock: the time between two steps of one optimizer, including everything in between."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from rotoopt import RotoGradOptimizer
from rotoopt.comparison._clock import BLOCK, StepClock


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def test_time_between_two_steps_counts_and_evaluation_does_not() -> None:
    optimizer = sgd()
    with StepClock() as clock:
        for step in range(5 * BLOCK + 1):
            time.sleep(0.001 if step != BLOCK else 1.0)
            optimizer.step()
    seconds = clock.seconds_per_step()
    assert seconds is not None
    assert 0.001 <= seconds < 0.01


def test_a_slow_step_per_block_counts_with_its_share() -> None:
    """The rotations are updated in such a step; a median of single steps would ignore it."""
    optimizer = sgd()
    with StepClock() as clock:
        for step in range(3 * BLOCK + 1):
            time.sleep(0.05 if step % BLOCK == 0 else 0.0)
            optimizer.step()
    seconds = clock.seconds_per_step()
    assert seconds is not None
    assert seconds >= 0.05 / BLOCK


def test_a_wrapped_optimizer_counts_one_step() -> None:
    backbone, heads = nn.Linear(2, 3), [nn.Linear(3, 1), nn.Linear(3, 1)]
    params = [p for module in (backbone, *heads) for p in module.parameters()]
    optimizer = RotoGradOptimizer(torch.optim.SGD(params, lr=0.1), heads)
    with StepClock() as clock:
        for _ in range(2 * BLOCK + 1):
            time.sleep(0.002)
            z = backbone(torch.ones(1, 2))
            optimizer.step([head(z).square().mean() for head in heads])
    seconds = clock.seconds_per_step()
    assert seconds is not None
    assert seconds >= 0.002


def test_of_two_optimizers_the_one_with_more_steps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rotoopt.comparison._clock.time.perf_counter", lambda: now[0])
    often, rarely = sgd(), sgd()
    with StepClock() as clock:
        for step in range(6):
            now[0] = float(step)
            often.step()
            if step % 2 == 0:
                now[0] += 0.5
                rarely.step()
    assert clock.seconds_per_step() == 1.0


@pytest.mark.parametrize("steps", [0, 1])
def test_no_time_without_two_steps(steps: int) -> None:
    optimizer = sgd()
    with StepClock() as clock:
        for _ in range(steps):
            optimizer.step()
    optimizer.step()  # after the clock stopped: not counted
    assert clock.seconds_per_step() is None
