"""compare: resuming, isolated failures, and rejected arguments."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotoopt import GradNorm, RotoGradOptimizer
from rotoopt.comparison import Comparison, compare
from rotoopt.comparison._processes import Failure
from rotoopt.comparison._progress import Progress, _duration
from rotoopt.comparison._run import Run, Trained
from tests.comparison.trainings import HIGHER_IS_BETTER, formula, make_network, raises, train

VALUES: dict[str, Mapping[str, Any]] = {"plain sum": {"value": 1.0}, "two": {"value": 2.0}, "half": {"value": 0.5}}


def compared(function: Callable[..., Any] = formula, **options: Any) -> Comparison:
    given: dict[str, Any] = {"higher_is_better": HIGHER_IS_BETTER, "candidates": VALUES, "seeds": 3, "quiet": True}
    return compare(function, **{**given, **options})


def table(result: Comparison) -> str:
    return result.to_markdown()


def numbers(result: Comparison) -> dict[str, dict[str, list[float]]]:
    return {name: {metric: of.tolist() for metric, of in each.items()} for name, each in result.metrics.items()}


class Interrupted(BaseException):
    """An interruption, like KeyboardInterrupt."""


@given(st.integers(0, 9), st.booleans())
def test_resumed_comparison_is_the_uninterrupted_one(done: int, searches: bool) -> None:
    options: dict[str, Any] = {"lrs": [0.1, 1.0], "search_seeds": [7]} if searches else {}
    calls = []

    def interrupted(seed: int, **options: Any) -> dict[str, float]:
        calls.append(seed)
        if len(calls) > done:
            raise Interrupted
        return formula(seed, **options)

    with TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "results" / "comparison.json"
        try:
            compared(interrupted, path=path, **options)
        except Interrupted:
            calls.clear()
        resumed = compared(path=path, **options)
        again = compared(lambda seed, **options: pytest.fail("ran once more"), path=path, **options)
    expected = compared(**options)
    assert numbers(resumed) == numbers(again) == numbers(expected)
    assert table(resumed) == table(again) == table(expected)


@given(st.permutations([0, 1, 2, 3]))
def test_the_order_of_seeds_does_not_change_the_table(seeds: list[int]) -> None:
    assert table(compared(seeds=seeds)) == table(compared(seeds=4))


@given(st.floats(1e-3, 1e3))
def test_the_unit_of_a_metric_does_not_change_delta_m(unit: float) -> None:
    def in_units(seed: int, **options: Any) -> dict[str, float]:
        metrics = formula(seed, **options)
        return {"left": unit * metrics["left"], "right": metrics["right"]}

    one, other = compared(), compared(in_units)
    for name in VALUES:
        torch.testing.assert_close(one.delta_m(name), other.delta_m(name))


def test_only_candidates_with_changed_options_run_again(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    calls: list[float] = []

    def counted(seed: int, value: float) -> dict[str, float]:
        calls.append(value)
        return formula(seed, value)

    compared(counted, path=path)
    calls.clear()
    result = compared(counted, path=path, candidates={**VALUES, "two": {"value": 3.0}})
    assert calls == [3.0] * 3
    assert numbers(result) == numbers(compared(candidates={**VALUES, "two": {"value": 3.0}}))
    calls.clear()
    compared(counted, path=path)  # the earlier results are kept
    assert calls == []


def test_other_metrics_need_new_runs(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    compared(path=path)
    result = compared(
        lambda seed, **options: {"left": 1.0, "third": 2.0}, path=path, higher_is_better={"left": True, "third": True}
    )
    assert result.metrics["two"]["left"].tolist() == [1.0] * 3


def test_a_changed_direction_of_a_metric_needs_no_training(tmp_path: Path) -> None:
    compared(path=tmp_path / "comparison.json")
    turned = compared(
        lambda seed, **options: pytest.fail("ran once more"),
        path=tmp_path / "comparison.json",
        higher_is_better=dict.fromkeys(HIGHER_IS_BETTER, True),
    )
    torch.testing.assert_close(turned.delta_m("two"), -compared().delta_m("two"))


def test_a_run_that_raises_does_not_affect_others_and_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    result, whole = compared(raises, path=path), compared()
    assert result.failures == {("two", 1): "TwoArguments: out of"}
    assert result.metrics["two"]["left"].isnan().tolist() == [False, True, False]
    for name in VALUES:
        rest = [0, 2] if name == "two" else [0, 1, 2]
        for metric in HIGHER_IS_BETTER:
            assert torch.equal(result.metrics[name][metric][rest], whole.metrics[name][metric][rest])
    assert "two failed with seed 1: TwoArguments: out of" in table(result)
    assert "(2 of 3)" in table(result)
    assert "diverged" not in table(result)
    torch.testing.assert_close(result.delta_m("two", clipped=True)[[0, 2]], whole.delta_m("two", clipped=True)[[0, 2]])
    assert result.delta_m("two", clipped=True)[1].isnan()
    assert table(compared(path=path)) == table(whole)  # only the failed run ran


def test_a_candidate_that_always_raises_is_a_row_without_numbers(tmp_path: Path) -> None:
    def refuses(seed: int, value: float) -> dict[str, float]:
        if value == 2.0:
            raise ValueError("no twos\nplease")
        return formula(seed, value)

    first, result = (compared(refuses, seeds=5, path=tmp_path / "comparison.json") for _ in range(2))
    assert table(first) == table(result)
    (two,) = [line for line in table(result).splitlines() if line.startswith("| two")]
    assert two.replace(" ", "") == "|two|-|-|-|"
    assert "two failed with seed 4: ValueError: no twos" in table(result).splitlines()
    torch.testing.assert_close(result.delta_m("half"), compared(seeds=5).delta_m("half"))


@given(st.sampled_from(list(VALUES)), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_run_that_diverges_is_reported_and_does_not_affect_others(name: str, bad: float) -> None:
    def diverges(seed: int, value: float) -> dict[str, float]:
        metrics = formula(seed, value)
        return {**metrics, "left": bad} if seed == 1 and value == VALUES[name]["value"] else metrics

    result = compared(diverges, baseline="plain sum")
    assert f"{name} diverged with seed 1." in table(result)
    assert "nan" not in table(result)
    for other in VALUES:
        others = result.delta_m(other)[[0, 2]]
        assert others.isfinite().all()
        assert result.delta_m(other, clipped=True)[[0, 2]].isfinite().all()
        if name != "plain sum":
            torch.testing.assert_close(others, compared().delta_m(other)[[0, 2]])
    changes = result.delta_m(name, clipped=True)
    if name == "plain sum":  # nothing is relative to a baseline that diverged
        assert changes[1].isnan()
    else:
        right = result.changes(name)[1, 1].clamp(-100, 100).item()
        assert changes[1].item() == pytest.approx((right - 100) / 2)


def test_a_bug_in_train_is_reported_before_everything_has_run() -> None:
    calls = []

    def broken(seed: int, value: float) -> dict[str, float]:
        calls.append(seed)
        raise KeyError("valdi")

    with pytest.raises(RuntimeError, match=r"(?s)must succeed with some candidate.*half, seed 0.*KeyError: 'valdi'"):
        compared(broken)
    assert len(calls) == len(VALUES)


def test_learning_rates_are_chosen_per_candidate_on_separate_seeds() -> None:
    seen = []

    def noted(seed: int, value: float, lr: float) -> dict[str, float]:
        seen.append((seed, value, lr))
        best = 0.1 if value == 2.0 else 1.0
        return {"left": 1 + abs(lr - best), "right": math.nan if lr == 10.0 else 1.0}

    result = compared(noted, lrs=[0.1, 1.0, 10.0], search_seeds=[8, 9])
    assert result.learning_rates == {"plain sum": 1.0, "two": 0.1, "half": 1.0}
    assert {lr for seed, value, lr in seen if seed < 3 and value == 2.0} == {0.1}
    assert len(seen) == 3 * 3 * 2 + 3 * 3
    assert "| 0.1 |" in table(result)


def test_given_numbers_are_a_baseline(tmp_path: Path) -> None:
    reference = {"left": 2.1, "right": 5.0}
    result = compared(baseline=reference, lrs=[0.1, 1.0])
    left, right = (result.metrics["two"][name] for name in HIGHER_IS_BETTER)
    torch.testing.assert_close(result.delta_m("two"), 50 * ((2.1 - left) / 2.1 + (5 - right) / 5), rtol=1e-12, atol=0)
    assert "relative to the given numbers;" in table(result)
    again = result.against("two").against(reference)
    assert table(again) == table(result)


def test_against_another_candidate_equals_compare_with_that_baseline() -> None:
    assert table(compared().against("two")) == table(compared(baseline="two"))


def test_every_run_starts_from_its_seed_and_restores_the_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    drawn: dict[int, list[float]] = {}

    def draws(seed: int, value: float) -> dict[str, float]:
        drawn.setdefault(seed, []).append(torch.rand(1).item())
        return formula(seed, value)

    compared(draws)
    assert torch.equal(torch.rand(1), expected)
    assert [len(set(of_seed)) for of_seed in drawn.values()] == [1, 1, 1]
    assert len({of_seed[0] for of_seed in drawn.values()}) == 3


def test_all_default_candidates_train() -> None:
    result = compare(train, higher_is_better=HIGHER_IS_BETTER, seeds=2, quiet=True)
    assert not result.failures
    assert all(of.isfinite().all() for each in result.metrics.values() for of in each.values())
    assert all((of > 0).all() for of in result.ms_per_step.values())
    assert len({of["left"][0].item() for of in result.metrics.values()}) == len(result.metrics)


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


def test_failures_after_a_success_do_not_stop_the_comparison() -> None:
    """The search of learning rates succeeded."""

    def fails(seed: int, value: float, lr: float) -> dict[str, float]:
        if seed < 3:
            raise ValueError("late")
        return formula(seed, value, lr)

    result = compared(fails, lrs=[0.1, 1.0])
    assert len(result.failures) == 3 * len(VALUES)


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


def used() -> GradNorm:
    weighting = GradNorm()
    backbone, heads = make_network()
    RotoGradOptimizer(torch.optim.SGD(backbone.parameters(), lr=0.1), heads, weighting=weighting)
    return weighting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": {}}, r"^`candidates` must have at least one entry, got none\.$"),
        (
            {"candidates": {"a": {"weighting": used()}}},
            r"^`candidates\['a'\]` must have a weighting of its own, got a GradNorm that an optimizer uses. Make a new "
            "GradNorm; every run gets a copy of it.$",
        ),
        ({"higher_is_better": {}}, r"one bool per metric, got \{\}"),
        ({"higher_is_better": {"left": 1}}, r"one bool per metric, got \{'left': 1\}"),
        ({"seeds": 0}, r"`seeds` must be a positive number, or different seeds, got \[\]"),
        ({"seeds": [1, 1]}, r"different seeds, got \[1, 1\]"),
        ({"baseline": "sum"}, "one of the candidates, plain sum, two, half, or a number for every metric, got 'sum'"),
        ({"baseline": {"left": 1.0}}, "a number for every metric, left, right, got left"),
        ({"baseline": {"left": 1.0, "up": 1.0}}, r"for every metric, left, right, got left, up\.$"),
        ({"baseline": {}}, r"for every metric, left, right, got none\.$"),
        ({"processes": 0}, "`processes` must be at least 1, got 0"),
        ({"lrs": []}, r"`lrs` must be different positive learning rates, got \[\]"),
        ({"lrs": [0.1, 0.1]}, "different positive learning rates"),
        ({"lrs": [-0.1]}, "different positive learning rates"),
        ({"lrs": [0.0]}, "different positive learning rates"),
        ({"lrs": [0.1], "search_seeds": [2, 3]}, r"that the comparison does not use, got \[2, 3\] beside \[0, 1, 2\]"),
        ({"lrs": [0.1], "search_seeds": []}, "that the comparison does not use"),
    ],
)
def test_bad_arguments_are_rejected_before_anything_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compared(lambda seed, **options: pytest.fail("ran"), **options)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.5, r"`train` must return a dict of metrics, got 0.5. .*, with the names of `higher_is_better`\.\n"),
        ({"left": 1.0}, "the metrics of `higher_is_better`, left, right, got left"),
        ({"left": 1.0, "right": 1.0, "more": 1.0}, "left, right, got left, right, more"),
    ],
)
def test_what_train_must_return(returned: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        compared(lambda seed, **options: returned)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "Expecting property name .*"),
        ("{}", "dict"),
        ("[1]", "list"),
        (json.dumps([{"job": {}, "values": [1.0]}]), r".*\(KeyError\('run'\)\)"),
    ],
)
def test_a_file_with_other_contents_is_rejected_and_not_changed(text: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    message = rf"^`path` must be a file .* written, or none yet, got .*other.json[:,] {found}\. Give another path\.$"
    with pytest.raises(ValueError, match=message):
        compared(path=path)
    assert path.read_text() == text


def test_a_binary_file_is_rejected_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\x03\x80")
    with pytest.raises(ValueError, match=r"`path` must be a file that .* got .*model.pt: .*decode.*Give another path"):
        compared(path=path)
    assert path.read_bytes() == b"PK\x03\x80"


def test_tensors_are_metrics_too() -> None:
    result = compared(lambda seed, **options: {"left": torch.tensor(2.0), "right": torch.tensor([1.0])})
    assert result.metrics["two"]["left"].tolist() == [2.0] * 3
