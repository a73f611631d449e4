"""The metrics equal those of the literature, and raise errors if they cannot be computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotoopt.diagnostics import mean_rank, mean_relative_change

METRICS = st.floats(0.01, 100)


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[list[float], list[float], list[bool]]:
    n = draw(st.integers(1, 8))
    values, references = (draw(st.lists(METRICS, min_size=n, max_size=n)) for _ in range(2))
    return values, references, draw(st.lists(st.booleans(), min_size=n, max_size=n))


@given(comparisons())
def test_relative_change_equals_its_definition(comparison: tuple[list[float], list[float], list[bool]]) -> None:
    """Delta-m = 100 / n sum_i (-1)^{l_i} (M_i - B_i) / B_i, with l_i = 1 where lower is better."""
    changes = [(-1) ** (not higher) * (M - B) / B for M, B, higher in zip(*comparison, strict=True)]
    assert mean_relative_change(*comparison) == pytest.approx(100 * sum(changes) / len(changes))


@given(comparisons(), st.data())
def test_better_is_positive(comparison: tuple[list[float], list[float], list[bool]], data: st.DataObject) -> None:
    _, references, higher_is_better = comparison
    signed = [reference * data.draw(st.sampled_from([-1, 1])) for reference in references]
    assert mean_relative_change(signed, signed, higher_is_better) == 0
    step = [0.1 if higher else -0.1 for higher in higher_is_better]
    better, worse = ([value + sign * d for value, d in zip(signed, step, strict=True)] for sign in (1, -1))
    assert mean_relative_change(better, signed, higher_is_better) > 0
    assert mean_relative_change(worse, signed, higher_is_better) < 0


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=6), st.data())
def test_ranks_equal_those_from_sorting(table: list[list[int]], data: st.DataObject) -> None:
    """Few different numbers, so that there are many ties, which share their mean rank."""
    higher_is_better = data.draw(st.lists(st.booleans(), min_size=3, max_size=3))
    ranks = mean_rank(
        {f"method {row}": [float(value) for value in values] for row, values in enumerate(table)}, higher_is_better
    )
    for row, values in enumerate(table):
        expected = []
        for metric, value in enumerate(values):
            column = sorted((other[metric] for other in table), reverse=higher_is_better[metric])
            places = [place for place, other in enumerate(column, start=1) if other == value]
            expected.append(sum(places) / len(places))
        assert ranks[f"method {row}"] == pytest.approx(sum(expected) / 3)
    assert sum(ranks.values()) == pytest.approx(len(table) * (len(table) + 1) / 2)


def test_sequences_and_tensors_are_equivalent() -> None:
    M, B = [0.5, 2.0], [0.4, 3.0]
    tensors = torch.tensor(M, requires_grad=True), torch.tensor(B, dtype=torch.float64)
    change = mean_relative_change(M, tuple(B), (True, False))
    assert mean_relative_change(*tensors, [True, False]) == pytest.approx(change)
    as_tensors = {"a": torch.tensor(M, requires_grad=True), "b": torch.tensor(B)}
    assert mean_rank(as_tensors, [True, True]) == mean_rank({"a": M, "b": B}, [True, True])


INVALID: dict[str, tuple[Callable[[], object], str]] = {
    "zero reference": (lambda: mean_relative_change([0.1], [0.0], [True]), r"`single_task` must not be zero"),
    "other lengths": (lambda: mean_relative_change([0.1, 0.2], [0.3], [True]), "got 2, 1 and 1"),
    "flags of another length": (lambda: mean_relative_change([0.1], [0.3], [True, False]), "got 1, 1 and 2"),
    "matrix": (lambda: mean_relative_change(torch.ones(2, 3), torch.ones(2, 3), [True] * 3), r"shape \(2, 3\).*seed"),
    "number": (lambda: mean_relative_change(torch.tensor(1.0), [1.0], [True]), r"`multi_task`.* got shape \(\)"),
    "nothing": (lambda: mean_relative_change([], [], []), r"`multi_task` must be .* shape \(0,\)"),
    "NaN": (lambda: mean_relative_change([math.nan], [1.0], [True]), "`multi_task` must be finite"),
    "infinite reference": (lambda: mean_relative_change([1.0], [math.inf], [True]), "`single_task` must be finite"),
    "flags that are no bools": (
        lambda: mean_relative_change([1.0], [1.0], [cast(bool, -1)]),
        "`higher_is_better` must be",
    ),
    "one flag for all": (lambda: mean_rank({"a": [1.0]}, True), "`higher_is_better` must be"),  # type: ignore[arg-type]
    "no methods": (lambda: mean_rank({}, [True]), "at least one method"),
    "too few metrics": (lambda: mean_rank({"a": [1.0, 2.0], "b": [1.0]}, [True, True]), "got 1 for b and 2 flags"),
    "NaN in results": (lambda: mean_rank({"a": [1.0], "b": [math.nan]}, [True]), r"`results\['b'\]` must be finite"),
}


@pytest.mark.parametrize("case", INVALID)
def test_errors_say_what_was_found(case: str) -> None:
    call, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        call()
