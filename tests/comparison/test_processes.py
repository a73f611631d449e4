"""Several processes: the same numbers as with one, and errors if several are not possible."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rotoopt.comparison import CANDIDATES, compare
from rotoopt.comparison._processes import Failure, _start, check_importable, outcomes
from tests.comparison.compared import VALUES, compared, numbers, table
from tests.comparison.trainings import HIGHER_IS_BETTER, ends, raises, threads, train


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    candidates = {name: CANDIDATES[name] for name in ("plain sum", "GradNorm", "default")}
    options: dict[str, Any] = {
        "higher_is_better": HIGHER_IS_BETTER,
        "candidates": candidates,
        "seeds": 2,
        "quiet": True,
    }
    one = compare(train, **options)
    two = compare(train, processes=2, path=tmp_path / "comparison.json", **options)
    assert numbers(one) == numbers(two)
    assert numbers(compare(ends, path=tmp_path / "comparison.json", **options)) == numbers(one)  # nothing runs


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_raises_in_a_process_does_not_affect_others() -> None:
    assert table(compared(raises, processes=2)) == table(compared(raises))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_process_that_exits_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"got one that exited without a result.*memory.*__main__"):
        compared(ends, processes=2)


ENDLESS = """
import os
import signal
import time
from rotoopt.comparison._processes import outcomes

def job(seconds):
    print(os.getpid(), flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it runs in the background
    list(outcomes(job, [1000.0, 1000.0], 2))
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_processes_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    parent = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=pipe, stderr=null, text=True)
    assert parent.stdout is not None
    children = [parent.stdout.readline().strip() for _ in range(2)]
    parent.stdout.close()
    assert all(_runs(child) for child in children)
    parent.send_signal(how)
    parent.wait(60)
    end = time.monotonic() + 60
    while any(_runs(child) for child in children):
        assert time.monotonic() < end
        time.sleep(0.1)


def _runs(process: str) -> bool:
    """Return whether a process exists and has not ended: in a container, nobody may collect it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path("/proc", process, "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("ours", "theirs"), [(5, 2.0), (1, 1.0)])
def test_processes_share_the_threads(ours: int, theirs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: ours)
    assert compared(threads, processes=2).metrics["two"]["left"].tolist() == [theirs] * 3


def test_functions_that_cannot_be_imported_are_rejected_immediately() -> None:
    message = (
        r"^`train` must be something that other processes can import, got <function .*>: .*lambda.*\. Put functions "
        r"and classes into a module, at its top level, or use processes=1\.$"
    )
    with pytest.raises(ValueError, match=message):
        compared(lambda seed, **options: pytest.fail("ran"), processes=2)
    candidates = {**VALUES, "mine": {"weighting": lambda gradients: gradients.sum(dim=0)}}
    with pytest.raises(ValueError, match=r"`candidates\['mine'\]` must be .* or use processes=1"):
        compared(train, processes=2, candidates=candidates)


@pytest.mark.parametrize("script", [None, "<stdin>"])
def test_a_function_of_a_notebook_is_rejected(script: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_a_session(seed: int, **options: Any) -> dict[str, float]:
        raise AssertionError

    main = sys.modules["__main__"]
    of_a_session.__module__, of_a_session.__qualname__ = "__main__", "of_a_session"
    monkeypatch.setattr(main, "of_a_session", of_a_session, raising=False)
    if script is None:
        monkeypatch.delattr(main, "__file__", raising=False)
    else:
        monkeypatch.setattr(main, "__file__", script, raising=False)
    for function in (of_a_session, functools.partial(of_a_session, value=1)):
        with pytest.raises(ValueError, match=r": it was defined in a notebook or an interactive session\. Put "):
            compared(function, processes=2)
    check_importable("train", train)  # that of a module can be imported


def test_a_function_of_a_script_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_a_script() -> None: ...

    main = sys.modules["__main__"]
    of_a_script.__module__, of_a_script.__qualname__ = "__main__", "of_a_script"
    monkeypatch.setattr(main, "of_a_script", of_a_script, raising=False)
    monkeypatch.setattr(main, "__file__", __file__, raising=False)
    check_importable("train", of_a_script)


class Pool:
    """A pool without processes: every job runs immediately, in this process."""

    made: ClassVar[list[Pool]] = []

    def __init__(self, num: int, *, mp_context: Any, initializer: Any, initargs: tuple[Any, ...]) -> None:
        self.started = (num, mp_context.get_start_method(), initializer, initargs)
        self.shut_down_with: dict[str, bool] = {}
        Pool.made.append(self)

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except BrokenProcessPool as error:
            future.set_exception(error)
        return future

    def shutdown(self, **options: bool) -> None:
        self.shut_down_with = options


@pytest.mark.parametrize(("ours", "theirs"), [(7, 3), (1, 1)])
def test_processes_are_spawned_and_divide_the_threads(ours: int, theirs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotoopt.comparison._processes.ProcessPoolExecutor", Pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: ours)
    found = list(outcomes(lambda job: 1 / job, [4, 2, 0], 2))
    assert {outcome.job: outcome.result for outcome in found if outcome.job} == {4: 0.25, 2: 0.5}
    (failure,) = (outcome.result for outcome in found if not outcome.job)
    assert isinstance(failure, Failure)
    assert failure.error == "ZeroDivisionError: division by zero"
    assert failure.traceback.startswith("Traceback")
    pool = Pool.made.pop()
    num_processes, method, start, (num_threads, _) = pool.started
    assert (num_processes, method, start, num_threads) == (2, "spawn", _start, theirs)
    assert pool.shut_down_with == {"cancel_futures": True}


def test_a_broken_pool_is_reported_and_the_remaining_jobs_are_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotoopt.comparison._processes.ProcessPoolExecutor", Pool)
    monkeypatch.setattr("rotoopt.comparison._processes._attempt", lambda function, job: function(job))

    def breaks(job: int) -> None:
        raise BrokenProcessPool

    message = (
        "Every process must live until its runs are done, got one that exited without a result. Either (a) there is "
        "not enough memory for so many: lower `processes`; or (b) a script calls this outside of "
        '`if __name__ == "__main__":`, so that every process runs it again. Finished runs are in `path`.'
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        list(outcomes(breaks, [1, 2], 2))
    assert Pool.made.pop().shut_down_with == {"cancel_futures": True}
