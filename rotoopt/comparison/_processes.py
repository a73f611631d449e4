"""Processes: one function for many jobs, in this process or in others; an error does not stop the other jobs."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """An exception as text: the object itself may not be picklable."""

    error: str
    traceback: str


@dataclass(frozen=True)
class Outcome(Generic[Job, Result]):
    """The result of a job, or its failure."""

    job: Job
    result: Result | Failure


def outcomes(
    function: Callable[[Job], Result], jobs: Sequence[Job], num_processes: int
) -> Iterator[Outcome[Job, Result]]:
    """Call ``function`` for every job, and yield each outcome as soon as it is known.

    Processes are spawned, not forked: a process that has used torch's thread pool must not be forked. The threads of
    this process are divided among them.

    Raises:
        RuntimeError: If a process exits without a result.
    """
    if num_processes == 1:
        for job in jobs:
            yield _attempt(function, job)
        return
    num_threads = max(1, torch.get_num_threads() // num_processes)
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start, initargs=(num_threads, reader))
    try:
        for future in as_completed([pool.submit(_attempt, function, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "Every process must live until its runs are done, got one that exited without a result. Either (a) there "
            "is not enough memory for so many: lower `processes`; or (b) a script calls this outside of "
            '`if __name__ == "__main__":`, so that every process runs it again. Finished runs are in `path`.'
        ) from error
    except BaseException:  # interrupted: do not wait for the jobs that are running
        writer.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(num_threads: int, parent: Connection) -> None:
    torch.set_num_threads(num_threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """End this process when the other end of the pipe ``parent`` is closed: by the parent, or because it was killed."""
    parent.poll(None)
    os._exit(1)


def _attempt(function: Callable[[Job], Result], job: Job) -> Outcome[Job, Result]:
    try:
        return Outcome(job, function(job))
    except Exception as error:
        return Outcome(job, Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))


def check_importable(name: str, value: Any) -> None:
    """Raise if other processes cannot receive ``value``.

    Raises:
        ValueError: If it cannot be pickled, or is a function of a session that cannot be imported.
    """
    try:
        pickle.dumps(value)
        reason = _session_of(value)
    except Exception as error:  # pickling calls methods of the objects, which may raise anything
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
        return "it was defined in a notebook or an interactive session"
    return None
