"""The tables of the comparison of methods, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rotoopt.diagnostics import mean_rank, mean_relative_change
from tests.benchmarks.comparison import Results, choose, final_jobs
from tests.benchmarks.comparison_methods import METHODS, SINGLE_TASK, Method
from tests.benchmarks.problems import Problem
from tests.benchmarks.quality_tables import plus_minus


def markdown(problems: Sequence[Problem], results: Results, seeds: int) -> str:
    """Return one table per problem, then one of the mean relative change on all of them.

    Cells are means over seeds and their standard errors. The mean relative change (Delta-m) is that against one network
    per task, paired by seed; ranks are those of the means over seeds.
    """
    tables, summary = [], {}
    for problem in problems:
        metrics = {
            name: torch.tensor([results[job] for job in jobs], dtype=torch.float64)
            for name, method in METHODS.items()
            if (jobs := [job for job in final_jobs(problem, method, results, seeds) if job in results])
        }
        if SINGLE_TASK in metrics:
            summary[problem.name] = _changes(problem, metrics)
            tables.append(_table(problem, metrics, summary[problem.name], results))
    return "\n\n".join([*tables, _summary(summary)])


def _changes(problem: Problem, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Delta-m of every method, seed by seed."""
    singles, signs = metrics[SINGLE_TASK], _signs(problem)
    mean = singles.mean(dim=0)  # not each seed's own: a mean of ratios is biased by the noise of the denominator
    return {
        name: torch.tensor(
            [
                mean_relative_change(mean + own - single, mean, signs)
                for own, single in zip(values, singles, strict=False)
            ],
            dtype=torch.float64,
        )
        for name, values in metrics.items()
    }


def _signs(problem: Problem) -> list[bool]:
    return [metric.higher_is_better for metric in problem.metrics]


def _table(problem: Problem, metrics: dict[str, Tensor], changes: dict[str, Tensor], results: Results) -> str:
    ranks = mean_rank({name: values.mean(dim=0) for name, values in metrics.items()}, _signs(problem))
    columns = [*(metric.name for metric in problem.metrics), "Delta-m, %", "mean rank", "learning rates", "ms"]
    lines = [f"### {problem.name}", "", _row("method", columns), "|---|" + "---:|" * len(columns)]
    for name, values in metrics.items():
        cells = [plus_minus(column) for column in values.T]
        change = plus_minus(changes[name], sign="+") if name != SINGLE_TASK else ""
        cells += [change, f"{ranks[name]:.1f}", _learning_rates(problem, METHODS[name], results)]
        lines.append(_row(name, [*cells, _time(problem, METHODS[name], results)]))
    return "\n".join(lines)


def _learning_rates(problem: Problem, method: Method, results: Results) -> str:
    setting = choose(problem, method, results)
    assert setting is not None  # there are results with it
    return f"x {setting.factor:g}" + (f", {setting.own_lr:g}" if setting.own_lr is not None else "")


def _time(problem: Problem, method: Method, results: Results) -> str:
    jobs = final_jobs(problem, method, results, 1, timed=True)
    return "".join(f"{1000 * results[job][0]:.1f}" for job in jobs if job in results)


def _summary(changes: dict[str, dict[str, Tensor]]) -> str:
    lines = ["### Delta-m, %", "", _row("method", changes), "|---|" + "---:|" * len(changes)]
    for name in METHODS:
        if name != SINGLE_TASK:
            cells = [plus_minus(of[name], sign="+") if name in of else "" for of in changes.values()]
            lines.append(_row(name, cells))
    return "\n".join(lines)


def _row(first: str, rest: Iterable[str]) -> str:
    return "| " + " | ".join([first, *rest]) + " |"
