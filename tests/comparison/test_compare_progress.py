"""compare(): the lines it prints, and the times it reports."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from rotoopt.comparison import compare
from rotoopt.comparison._processes import Failure
from rotoopt.comparison._progress import Progress, _duration
from rotoopt.comparison._run import Run, Trained
from tests.comparison.compared import VALUES, compared
from tests.comparison.trainings import HIGHER_IS_BETTER, formula, raises


def test_time_per_step_is_in_milliseconds() -> None:
    def sleeps(seed: int, value: float) -> dict[str, float]:
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        for _ in range(4):
            time.sleep(0.005 * value)
            sgd.step()
        return formula(seed, value)

    times = compared(sleeps, seeds=2).ms_per_step
    assert [len(of_seeds) for of_seeds in times.values()] == [2, 2, 2]
    assert all(of_seeds.dtype == torch.float64 for of_seeds in times.values())
    assert (times["two"] >= 10).all()
    assert (times["two"] < 1000).all()


def test_exact_time_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**9, 10**9 + 100))
    monkeypatch.setattr("rotoopt.comparison._clock.time.perf_counter", lambda: next(now))

    def steps(seed: int, value: float) -> dict[str, float]:
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        for _ in range(4):
            sgd.step()
        return formula(seed, value)

    result = compared(steps, seeds=2, candidates={"plain sum": {"value": 1.0}})
    assert result.ms_per_step["plain sum"].tolist() == [1000.0, 1000.0]


def test_progress_is_one_line_per_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    compared(raises, quiet=False, path=tmp_path / "comparison.json")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line[:1].isdigit()]
    assert len(lines) == 9
    left, right = formula(0).values()
    assert lines[0].startswith(f"1/9  plain sum, seed 0: left {left:.4g}, right {right:.4g} (0.")
    assert "failed" in captured.err
    assert "Traceback" in captured.err
    compared(quiet=False, path=tmp_path / "comparison.json")
    assert f"Comparison: 9 runs, 8 of them found in {tmp_path / 'comparison.json'}\n" in capsys.readouterr().err
    compared(quiet=True)
    assert capsys.readouterr().err == ""
    compared(quiet=False, lrs=[0.1, 1.0])
    written = capsys.readouterr().err.splitlines()
    assert written[0] == "Search of learning rates: 18 runs"
    assert written[19] == "Comparison: 9 runs"


def test_every_line_of_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 12.0, 100.0, 108.0, 5000.0, 100_000.0, 100_001.0])
    monkeypatch.setattr("rotoopt.comparison._progress.time.perf_counter", lambda: next(now))
    progress = Progress(quiet=False)
    run = Run("two", "", 0.01, 3, ("error",))
    progress.begin("Comparison", 9, 0, None)
    progress.report(run, Trained({"left": 0.123456, "right": None}, None, 4.04))
    progress.begin("Search", 9, 5, Path("file.json"))
    progress.report(run, Failure("ValueError: no", "Traceback\nValueError: no\n"))
    progress.report(Run("two", "", None, 3, ("error",)), Trained({"left": 1.0}, None, 1.0))
    progress.report(run, Trained({"left": 1.0}, None, 1.0))
    progress.report(run, Trained({"left": 1.0}, None, 1.0))
    assert capsys.readouterr().err.splitlines() == [
        "Comparison: 9 runs",
        "1/9  two, lr 0.01, seed 3: left 0.1235, right diverged (4.0 s); about 80 s left",
        "Search: 9 runs, 5 of them found in file.json",
        "1/4  two, lr 0.01, seed 3: failed; about 24 s left",
        "Traceback",
        "ValueError: no",
        "2/4  two, seed 3: left 1 (1.0 s); about 82 min left",
        "3/4  two, lr 0.01, seed 3: left 1 (1.0 s); about 9.2 h left",
        "4/4  two, lr 0.01, seed 3: left 1 (1.0 s)",
    ]


def test_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    result = compare(formula, higher_is_better=HIGHER_IS_BETTER, candidates=VALUES)
    assert result.seeds == tuple(range(5))
    assert result.baseline == "plain sum"
    assert capsys.readouterr().err.startswith("Comparison: 15 runs\n")


def test_durations() -> None:
    seconds = (1.4, 89.0, 90.0, 5300.0, 5400.0)
    assert [_duration(each) for each in seconds] == ["1 s", "89 s", "2 min", "88 min", "1.5 h"]
