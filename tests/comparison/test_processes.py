"""Several processes: the same numbers as with one, and errors if several are not possible."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rotoopt.comparison import CANDIDATES, compare
from tests.comparison.test_compare import VALUES, compared, numbers, table
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


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("ours", "theirs"), [(5, 2.0), (1, 1.0)])
def test_processes_share_the_threads(ours: int, theirs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: ours)
    assert compared(threads, processes=2).metrics["two"]["left"].tolist() == [theirs] * 3


def test_functions_that_cannot_be_imported_are_rejected_immediately() -> None:
    with pytest.raises(ValueError, match=r"`train` must be something that other processes can import, got <function"):
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
        with pytest.raises(ValueError, match="defined in a notebook or an interactive session"):
            compared(function, processes=2)
