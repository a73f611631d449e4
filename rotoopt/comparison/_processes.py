"""Processes: the same function for many jobs, here or in processes of their own, and no error stops the others."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """An exception, in words: the object itself may not survive the way between processes."""

    error: str
    traceback: str


@dataclass(frozen=True)
class Outcome(Generic[Job, Result]):
    """What became of a job: its result, or why there is none."""

    job: Job
    result: Result | Failure


def outcomes(
    function: Callable[[Job], Result], jobs: Sequence[Job], num_processes: int
) -> Iterator[Outcome[Job, Result]]:
    """Call ``function`` for every job, and yield what became of it as soon as it is known.

    Processes are spawned, not forked: one that has used torch's thread pool must not be forked. Each gets its share of
    the threads of this one.

    Raises:
        RuntimeError: If a process ends without an answer.
    """
    if num_processes == 1:
        for job in jobs:
            yield _attempt(function, job)
        return
    num_threads = max(1, torch.get_num_threads() // num_processes)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=torch.set_num_threads, initargs=(num_threads,)
    )
    try:
        for future in as_completed([pool.submit(_attempt, function, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "Every process must live until its runs are done, got one that ended without an answer. Either (a) there "
            "is not enough memory for so many: lower `processes`; or (b) a script calls this outside of "
            '`if __name__ == "__main__":`, and every process starts it anew. What has finished is in `path`.'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(function: Callable[[Job], Result], job: Job) -> Outcome[Job, Result]:
    try:
        return Outcome(job, function(job))
    except Exception as error:
        return Outcome(job, Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))


def check_importable(name: str, value: Any) -> None:
    """Raise if other processes could not have ``value``.

    Raises:
        ValueError: If it cannot be pickled, or is a function of a session that cannot be imported.
    """
    try:
        pickle.dumps(value)
        reason = _session_of(value)
    except Exception as error:  # pickle raises whatever objects raise
        reason = str(error)
    if reason is not None:
        raise ValueError(
            f"`{name}` must be something that other processes can import, got {value!r}: {reason}. Put functions and "
            "classes into a module, at its top level, or use processes=1."
        )


def _session_of(value: Any) -> str | None:
    function = value.func if isinstance(value, functools.partial) else value
    script = getattr(sys.modules["__main__"], "__file__", None)
    if getattr(function, "__module__", None) == "__main__" and not (script and Path(script).is_file()):
        return "it was made in a notebook or an interactive session"
    return None
