"""Table: a comparison as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotoopt.comparison._statistics import LIMIT, mean_and_error

if TYPE_CHECKING:
    from rotoopt.comparison._comparison import Comparison


def markdown(comparison: Comparison) -> str:
    """Return the table of a comparison, with notes on how to read it."""
    baseline = comparison.baseline
    deltas = {name: comparison.delta_m(name) for name in comparison.metrics}
    clipped = {name: comparison.delta_m(name, clipped=True) for name in comparison.metrics}
    differ = any(not torch.allclose(deltas[name], clipped[name], equal_nan=True) for name in deltas)
    timed = any(times.isfinite().any() for times in comparison.ms_per_step.values())
    arrows = {name: "↑" if higher else "↓" for name, higher in comparison.higher_is_better.items()}
    columns = [*(f"{name} {arrow}" for name, arrow in arrows.items()), "Delta-m, %"]
    columns += ["clipped, %"] * differ + ["lr"] * bool(comparison.learning_rates) + ["ms per step"] * timed
    rows = [["candidate", *columns]]
    for name, of_metrics in comparison.metrics.items():
        cells = [cell(of_metrics[metric]) for metric in arrows]
        changes = [deltas[name], clipped[name]] if differ else [deltas[name]]
        cells += ["0" if name == baseline else cell(change, sign="+") for change in changes]
        if comparison.learning_rates:
            chosen = comparison.learning_rates.get(name)
            cells.append("" if chosen is None else f"{chosen:g}")
        if timed:
            times = comparison.ms_per_step[name]
            cells.append(f"{times.nanmedian():.1f}" if times.isfinite().any() else "")
        rows.append([name, *cells])
    return "\n".join([*_aligned(rows), "", *_legend(comparison, differ=differ)])


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table whose cells are padded, so that it can be read in a terminal, too."""
    first, *rest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cells[0].ljust(first), *map(str.rjust, cells[1:], rest)] for cells in rows]
    lines = [row(name, cells) for name, *cells in padded]
    below = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in rest)])
    return [lines[0], f"|{below}|", *lines[1:]]


def _legend(comparison: Comparison, *, differ: bool) -> list[str]:
    seeds = f"{len(comparison.seeds)} seed" + "s" * (len(comparison.seeds) > 1)
    paired = isinstance(comparison.baseline, str)
    relative = f"{comparison.baseline}, paired by seed" if paired else "the given numbers"
    lines = [f"Mean ± standard error, {seeds}."]
    lines.append(f"Delta-m: mean change of the metrics relative to {relative}; positive is better.")
    if differ:
        lines.append(f"Clipped: changes are limited to {LIMIT:.0f} %; a run that diverged counts as -{LIMIT:.0f} %.")
    for name, of_metrics in comparison.metrics.items():
        lost = torch.stack([of_metrics[metric].isnan() for metric in comparison.higher_is_better]).any(dim=0)
        failed = torch.tensor([(name, seed) in comparison.failures for seed in comparison.seeds])
        diverged = [str(seed) for seed, so in zip(comparison.seeds, lost & ~failed, strict=True) if so]
        if diverged:
            lines.append(f"{name} diverged with seed {', '.join(diverged)}.")
    for (name, seed), error in comparison.failures.items():
        lines.append(f"{name} failed with seed {seed}: {error.splitlines()[0]}")
    return lines


def cell(values: Tensor, sign: str = "") -> str:
    """Format one number per seed as mean and standard error, with the number of seeds if some have none."""
    known = int(values.isfinite().sum())
    if known == 0:
        return "-"
    return plus_minus(values, sign) + (f" ({known} of {len(values)})" if known < len(values) else "")


def plus_minus(values: Tensor, sign: str = "") -> str:
    """Format one number per seed as mean and standard error, with three digits.

    Example:
        >>> plus_minus(torch.tensor([1.0, 3.0])), plus_minus(torch.tensor([0.00214]))
        ('2.00 ± 1.00', '0.00214')
    """
    mean, error = mean_and_error(values)
    size = max(abs(mean), abs(error) if math.isfinite(error) else 0.0)
    forms = {10: ".1f", 1: ".2f", 0.01: ".3f", 0.001: ".5f"}
    form = next((form for least, form in forms.items() if size >= least), ".2e" if size > 0 else ".3f")
    return f"{mean:{sign}{form}}" + ("" if math.isnan(error) else f" ± {error:{form}}")


def row(first: str, rest: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join([first, *rest]) + " |"


def rule(num_columns: int) -> str:
    """Return the line below the header of a table with this many numeric columns."""
    return "|---|" + "---:|" * num_columns
