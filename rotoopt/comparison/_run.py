"""Run: one training with one candidate and one seed: what identifies it, and its result."""

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
    """Identifies a run: a stored result is used again if all of this is equal.

    Attributes:
        candidate: Its name.
        options: Its options, as text.
        lr: Learning rate, None if ``train`` is called without one.
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
    """The result of a run: metrics, None where not finite, and times in seconds."""

    metrics: dict[str, float | None]
    seconds_per_step: float | None
    seconds: float


def execute(train: Train, job: tuple[Run, Options]) -> Trained:
    """Train once, with a copy of the options and a seeded generator; restore the generator's state afterwards."""
    run, options = job
    own_options = dict(copy.deepcopy(dict(options)))  # a weighting belongs to one optimizer
    if run.lr is not None:
        own_options["lr"] = run.lr
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), StepClock() as clock:
        torch.manual_seed(run.seed)
        metrics = train(run.seed, **own_options)
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
