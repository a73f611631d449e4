"""The tables of the comparison of methods, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rotoopt.comparison import _statistics as statistics
from rotoopt.comparison import _table as tables
from rotoopt.comparison._table import row, rule
from rotoopt.diagnostics import mean_rank
from tests.benchmarks.comparison import Results, choose, final_jobs, untuned_jobs
from tests.benchmarks.comparison_methods import DEFAULT, METHODS, PLAIN_SUM, SINGLE_TASK, Method
from tests.benchmarks.problems import Problem

Changes = dict[str, dict[str, Tensor]]  # (seeds, n), by problem and method


def markdown(problems: Sequence[Problem], results: Results, seeds: int) -> str:
    """Return the tables of the quality page.

    The tables are: the mean relative change on all problems, with ranks; the effect of parts of the default; runs
    without tuning; and the metrics, one table per problem. Cells are means over seeds with standard errors. The
    mean relative change (Delta-m) is against one network per task, paired by seed; so are ranks and differences.
    """
    details, changes = [], {}
    for problem in problems:
        metrics = tested(problem, results, seeds)
        if SINGLE_TASK in metrics:
            changes[problem.name] = relative_changes(problem, metrics)
            details.append(_metrics(problem, metrics, changes[problem.name], results))
    return "\n\n".join([_summary(changes), _parts(changes, DEFAULT), _untuned(problems, results, changes), *details])


def tested(problem: Problem, results: Results, seeds: int) -> dict[str, Tensor]:
    """Return the metrics of the methods that have run on all seeds, with the selected rates. Shape ``(seeds, n)``."""
    jobs = {name: final_jobs(problem, method, results, seeds) for name, method in METHODS.items()}
    return {
        name: torch.tensor([results[job] for job in of], dtype=torch.float64)
        for name, of in jobs.items()
        if of and all(job in results for job in of)
    }


def relative_changes(problem: Problem, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the improvement of every metric over one network per task in percent. Shape ``(seeds, n)``."""
    signs = torch.tensor([1.0 if higher else -1.0 for higher in _higher_is_better(problem)])
    return {name: statistics.relative_changes(of, metrics[SINGLE_TASK], signs) for name, of in metrics.items()}


def clipped(changes: Tensor) -> Tensor:
    """Return the mean change per seed, with changes clipped to 100 %. ``(seeds, n)`` to ``(seeds,)``."""
    return statistics.clip(changes).mean(dim=1)


def _higher_is_better(problem: Problem) -> list[bool]:
    return [metric.higher_is_better for metric in problem.metrics]


def _metrics(problem: Problem, metrics: dict[str, Tensor], changes: dict[str, Tensor], results: Results) -> str:
    finite = {name: values.mean(dim=0) for name, values in metrics.items() if values.isfinite().all()}
    ranks = mean_rank(finite, _higher_is_better(problem))
    columns = [*(metric.name for metric in problem.metrics), "Delta-m, %", "mean rank", "learning rates", "ms"]
    lines = [f"### {problem.name}", "", row("method", columns), rule(len(columns))]
    for name, values in metrics.items():
        cells = [_cell(column) for column in values.T]
        change = _cell(changes[name].mean(dim=1), sign="+") if name != SINGLE_TASK else ""
        rank = f"{ranks[name]:.1f}" if name in ranks else ""
        cells += [change, rank, _learning_rates(problem, METHODS[name], results)]
        lines.append(row(name, [*cells, _time(problem, METHODS[name], results)]))
    return "\n".join(lines)


def _learning_rates(problem: Problem, method: Method, results: Results) -> str:
    setting = choose(problem, method, results)
    assert setting is not None  # there are results with it
    return f"x {setting.factor:g}" + (f", {setting.own_lr:g}" if setting.own_lr is not None else "")


def _time(problem: Problem, method: Method, results: Results) -> str:
    jobs = final_jobs(problem, method, results, 1, timed=True)
    return "".join(f"{1000 * results[job][0]:.1f}" for job in jobs if job in results)


def _summary(changes: Changes) -> str:
    """Return the table of all methods, with their ranks."""
    methods = [name for name in _methods(changes) if not METHODS[name].variant]
    ranked = [name for name in methods if all(name in of for of in changes.values())]
    scores = [{name: clipped(of[name]) for name in ranked} for of in changes.values()]
    ranks = torch.stack([_ranks(of.values()) for of in scores]).mean(dim=0)
    means = [{name: score.mean() for name, score in of.items()} for of in scores]
    columns = [*changes, "mean rank", "behind the best, at worst"]
    lines = ["### Delta-m, %", "", row("method", columns), rule(len(columns))]
    for name in methods:
        cells = [_cell(of[name].mean(dim=1), sign="+") if name in of else "" for of in changes.values()]
        if name in ranked:
            worst = max(max(of.values()) - of[name] for of in means)
            cells += [_cell(ranks[ranked.index(name)]), f"{worst:.0f}"]
        else:
            cells += ["", ""]
        lines.append(row(name, cells))
    return "\n".join(lines)


def _parts(changes: Changes, whole: str) -> str:
    """Return the table of the differences of the plain sum, and of variants of the method ``whole``, from it."""
    lines = [f"### Ahead of the {whole}, points of Delta-m (metrics clipped to 100 %)", ""]
    lines += [row("", changes), rule(len(changes))]
    for name in _methods(changes):
        if name == PLAIN_SUM or METHODS[name].variant == whole:
            both = [(of[name], of[whole]) if name in of and whole in of else None for of in changes.values()]
            ahead = ["" if pair is None else _cell(clipped(pair[0]) - clipped(pair[1]), sign="+") for pair in both]
            lines.append(row(name.removeprefix(f"{whole}, "), ahead))
    return "\n".join(lines)


def _methods(changes: Changes) -> list[str]:
    return [name for name in METHODS if name != SINGLE_TASK and any(name in of for of in changes.values())]


def _ranks(scores: Iterable[Tensor]) -> Tensor:
    """Return the ranks of the methods in every seed, 1 for the best. n times ``(seeds,)`` to ``(n, seeds)``."""
    stacked = torch.stack(list(scores))
    return 1.0 + (stacked[None] > stacked[:, None]).sum(dim=1)


def _untuned(problems: Sequence[Problem], results: Results, changes: Changes) -> str:
    """Return the table of the differences from the plain sum at the learning rate that is best for it."""
    lines = ["### Ahead of the plain sum, not tuned, points of Delta-m (metrics clipped to 100 %)", ""]
    lines += [row("method", [problem.name for problem in problems]), rule(len(problems))]
    for name, method in METHODS.items():
        cells = []
        for problem in problems:
            known = changes.get(problem.name, {})
            jobs = untuned_jobs(problem, method, results, len(known.get(PLAIN_SUM, ())))
            if not jobs or any(job not in results for job in jobs):
                cells.append("")
                continue
            metrics = {name: torch.tensor([results[job] for job in jobs], dtype=torch.float64)}
            metrics |= {SINGLE_TASK: tested(problem, results, len(jobs))[SINGLE_TASK]}
            own = relative_changes(problem, metrics)[name]
            cells.append(_cell(clipped(own) - clipped(known[PLAIN_SUM]), sign="+"))
        if any(cells):
            lines.append(row(name, cells))
    return "\n".join(lines)


def _cell(values: Tensor, sign: str = "") -> str:
    return tables.cell(values, sign).replace(" ", "\u00a0")  # one line in a narrow column
