"""Progress: one line of plain text per run, on standard error."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rotoopt.comparison._processes import Failure
from rotoopt.comparison._run import Run, Trained


class Progress:
    """Prints finished runs, and an estimate of the remaining time.

    Args:
        quiet: Print nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._start = time.perf_counter()
        self._count = self._done = 0

    def begin(self, what: str, num_runs: int, num_known: int, path: Path | None) -> None:
        """Print the number of runs, and how many of them are known already."""
        self._start, self._count, self._done = time.perf_counter(), num_runs - num_known, 0
        known = f", {num_known} of them found in {path}" if num_known else ""
        self._say(f"{what}: {num_runs} runs{known}")

    def report(self, run: Run, result: Trained | Failure) -> None:
        """Print the result of a run."""
        self._done += 1
        details = ""
        if isinstance(result, Failure):
            outcome, details = "failed", f"\n{result.traceback.rstrip()}"
        else:
            numbers = {name: "diverged" if value is None else f"{value:.4g}" for name, value in result.metrics.items()}
            outcome = ", ".join(f"{name} {number}" for name, number in numbers.items())
            outcome += f" ({result.seconds:.1f} s)"
        left = (time.perf_counter() - self._start) / self._done * (self._count - self._done)
        rest = f"; about {_duration(left)} left" if self._done < self._count else ""
        self._say(f"{self._done}/{self._count}  {run}: {outcome}{rest}{details}")

    def _say(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
