"""compare: resuming, isolated failures, and rejected arguments."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotoopt.comparison import compare
from tests.comparison.compared import VALUES, compared, numbers, table
from tests.comparison.trainings import HIGHER_IS_BETTER, formula, raises, train


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


def test_failures_after_a_success_do_not_stop_the_comparison() -> None:
    """The search of learning rates succeeded."""

    def fails(seed: int, value: float, lr: float) -> dict[str, float]:
        if seed < 3:
            raise ValueError("late")
        return formula(seed, value, lr)

    result = compared(fails, lrs=[0.1, 1.0])
    assert len(result.failures) == 3 * len(VALUES)
