"""Comparisons of the formula, and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rotoopt.comparison import Comparison, compare
from tests.comparison.trainings import HIGHER_IS_BETTER, formula

VALUES: dict[str, Mapping[str, Any]] = {"plain sum": {"value": 1.0}, "two": {"value": 2.0}, "half": {"value": 0.5}}


def compared(function: Callable[..., Any] = formula, **options: Any) -> Comparison:
    given: dict[str, Any] = {"higher_is_better": HIGHER_IS_BETTER, "candidates": VALUES, "seeds": 3, "quiet": True}
    return compare(function, **{**given, **options})


def table(result: Comparison) -> str:
    return result.to_markdown()


def numbers(result: Comparison) -> dict[str, dict[str, list[float]]]:
    return {name: {metric: of.tolist() for metric, of in each.items()} for name, each in result.metrics.items()}
