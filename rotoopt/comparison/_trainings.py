"""Trainings: executes the runs whose results are not in the file yet, and stores them there."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from rotoopt.comparison._candidates import Options, describe
from rotoopt.comparison._processes import Failure, outcomes
from rotoopt.comparison._progress import Progress
from rotoopt.comparison._run import Run, Train, Trained, execute
from rotoopt.comparison._store import load, save


class Trainings:
    """The runs of one comparison.

    Args:
        train: The user's training function.
        candidates: Options by name.
        metrics: Names of the metrics.
        path: Where results are stored; None: nowhere.
        processes: Number of runs at a time.
        quiet: Whether nothing is printed.

    Attributes:
        failures: Error messages by candidate and seed.
    """

    def __init__(
        self,
        train: Train,
        candidates: Mapping[str, Options],
        metrics: Sequence[str],
        path: Path | None,
        processes: int,
        *,
        quiet: bool,
    ) -> None:
        self._train = train
        self._candidates = {name: candidates[name] for name in candidates}
        self._descriptions = {name: describe(options) for name, options in self._candidates.items()}
        self._metrics = list(metrics)
        self._path = path
        self._processes = processes
        self._progress = Progress(quiet=quiet)
        self._known = {} if path is None else _read(path)
        self._any_success = False
        self.failures: dict[Run, str] = {}

    def run(self, candidate: str, lr: float | None, seed: int) -> Run:
        """Return the identity of a run."""
        return Run(candidate, self._descriptions[candidate], lr, seed, tuple(sorted(self._metrics)))

    def finish(self, what: str, runs: Sequence[Run]) -> None:
        """Execute the missing ones of ``runs``, and save each result immediately.

        Raises:
            RuntimeError: If as many runs fail as there are candidates before any succeeds.
        """
        missing = [run for run in runs if run not in self._known]
        self._any_success |= len(missing) < len(runs)
        self._progress.begin(what, len(runs), len(runs) - len(missing), self._path)
        jobs = [(run, self._candidates[run.candidate]) for run in missing]
        for outcome in outcomes(functools.partial(execute, self._train), jobs, self._processes):
            run, result = outcome.job[0], outcome.result
            self._progress.report(run, result)
            if isinstance(result, Failure):
                self._note_failure(run, result)
            else:
                self._any_success = True
                self._known[run] = result
                if self._path is not None:
                    _write(self._path, self._known)

    def _note_failure(self, run: Run, failure: Failure) -> None:
        self.failures[run] = failure.error
        if not self._any_success and len(self.failures) >= len(self._candidates):
            raise RuntimeError(
                f"`train` must succeed with some candidate, got {len(self.failures)} failed runs and no other. The "
                f"last was {run}:\n{failure.traceback}"
            )

    def values(self, runs: Sequence[Run]) -> Tensor:
        """Return the metrics of some runs, NaN where one diverged or failed. Shape ``(len(runs), n)``."""
        rows = [[self._value(run, name) for name in self._metrics] for run in runs]
        return torch.tensor(rows, dtype=torch.float64)

    def _value(self, run: Run, metric: str) -> float:
        value = self._known[run].metrics[metric] if run in self._known else None
        return math.nan if value is None else value

    def ms_per_step(self, runs: Sequence[Run]) -> Tensor:
        """Return the milliseconds per step of some runs, NaN where unknown. Shape ``(len(runs),)``."""
        seconds = [self._known[run].seconds_per_step if run in self._known else None for run in runs]
        return torch.tensor([math.nan if each is None else 1000 * each for each in seconds], dtype=torch.float64)


def _read(path: Path) -> dict[Run, Trained]:
    entries = load(path)
    try:
        return {
            Run(**{**entry["run"], "metrics": tuple(entry["run"]["metrics"])}): Trained(**entry["trained"])
            for entry in entries
        }
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"`path` must be a file that compare has written, or none yet, got {path}, which holds something else "
            f"({error!r}). Give another path."
        ) from error


def _write(path: Path, known: Mapping[Run, Trained]) -> None:
    save(path, ({"run": asdict(run), "trained": asdict(trained)} for run, trained in known.items()))
