"""Run: one training, with one candidate and one seed; what tells it from others, and what comes of it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rotoopt.comparison._candidates import Options
from rotoopt.comparison._clock import StepClock

Train = Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """What tells a run from others: results are found again where all of it is the same.

    Attributes:
        candidate: Its name.
        options: Its options, in words.
        lr: Learning rate, None where ``train`` has its own.
        seed: Its seed.
        metrics: Names of the metrics, sorted.
    """

    candidate: str
    options: str
    lr: float | None
    seed: int
    metrics: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.candidate}, " + ("" if self.lr is None else f"lr {self.lr:g}, ") + f"seed {self.seed}"


@dataclass(frozen=True)
class Trained:
    """What comes of a run: metrics, None where one is not finite, and times in seconds."""

    metrics: dict[str, float | None]
    seconds_per_step: float | None
    seconds: float


def execute(train: Train, job: tuple[Run, Options]) -> Trained:
    """Train once, with options of its own and torch's generator seeded; the generator is set back afterwards."""
    run, options = job
    made_anew = dict(copy.deepcopy(dict(options)))  # a weighting serves one optimizer only
    if run.lr is not None:
        made_anew["lr"] = run.lr
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), StepClock() as clock:
        torch.manual_seed(run.seed)
        metrics = train(run.seed, **made_anew)
    return Trained(_checked(metrics, run.metrics), clock.seconds_per_step(), time.perf_counter() - start)


def _checked(metrics: Any, names: tuple[str, ...]) -> dict[str, float | None]:
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"`train` must return a dict of metrics, got {metrics!r}. Return {{name: number}}, with the names of "
            "`higher_is_better`."
        )
    if tuple(sorted(metrics)) != names:
        raise ValueError(
            f"`train` must return the metrics of `higher_is_better`, {', '.join(names)}, got {', '.join(metrics)}."
        )
    numbers = {name: float(value) for name, value in metrics.items()}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}
