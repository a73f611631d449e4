"""One training of the comparison of methods, here or in the environment of the official package.

There, this file is run as a script.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import torch

from tests.benchmarks.comparison_methods import METHODS, Setting
from tests.benchmarks.official_rotograd import PYTHON
from tests.benchmarks.problems import PROBLEMS

NUM_TIMED, NUM_WARM_UP = 60, 10  # steps


@dataclass(frozen=True)
class Job:
    """What to train: names, learning rates, seed; ``timed``: only a few steps, to measure the time."""

    problem: str
    method: str
    factor: float
    own_lr: float | None
    seed: int
    timed: bool = False


def run(job: Job) -> list[float]:
    """Return the metrics after training; the seconds per step of a timed job."""
    if METHODS[job.method].official and "rotograd" not in sys.modules:
        return _run_elsewhere(job)
    torch.set_num_threads(1)
    trial = PROBLEMS[job.problem].make(job.seed)
    torch.manual_seed(job.seed)  # for Haar rotations and random aggregators
    training = METHODS[job.method].training(trial, Setting(job.factor, job.own_lr))
    if not job.timed:
        return training.run()
    seconds = []
    for inputs, targets in islice(cycle(trial.batches()), NUM_WARM_UP + NUM_TIMED):
        start = time.perf_counter()
        training.step(inputs, targets)
        seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[NUM_WARM_UP:])]


def _run_elsewhere(job: Job) -> list[float]:
    root = Path(__file__).parents[2]
    command = [str(PYTHON), "-m", "tests.benchmarks.comparison_run", json.dumps(asdict(job))]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    metrics: list[float] = json.loads(done.stdout)
    return metrics


if __name__ == "__main__":
    import rotograd  # type: ignore[import-not-found] # noqa: F401 # only in its own environment

    print(json.dumps(run(Job(**json.loads(sys.argv[1])))))
