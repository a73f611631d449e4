"""The tables of the comparison of methods, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rotoopt.diagnostics import mean_rank
from tests.benchmarks.comparison import SEARCH_SEEDS, Results, choose, final_jobs
from tests.benchmarks.comparison_methods import DEFAULT, METHODS, PLAIN_SUM, SINGLE_TASK, Method
from tests.benchmarks.comparison_run import Job
from tests.benchmarks.problems import Problem

LIMIT = 100.0  # percent, to which the change of a metric is clipped in ranks


def markdown(problems: Sequence[Problem], results: Results, seeds: int) -> str:
    """Return a table of the mean relative change on all problems, one of runs that are not tuned, and one per problem.

    Cells are means over seeds and their standard errors. The mean relative change (Delta-m) is that against one network
    per task, paired by seed; so are ranks.
    """
    tables, changes = [], {}
    for problem in problems:
        metrics = tested(problem, results, seeds)
        if SINGLE_TASK in metrics:
            changes[problem.name] = relative_changes(problem, metrics)
            tables.append(_table(problem, metrics, changes[problem.name], results))
    return "\n\n".join([_summary(changes), _untuned(problems, results), *tables])


def tested(problem: Problem, results: Results, seeds: int) -> dict[str, Tensor]:
    """Return the metrics of the methods that have run, with the learning rates they chose. Shape ``(seeds, n)``."""
    return {
        name: torch.tensor([results[job] for job in jobs], dtype=torch.float64)
        for name, method in METHODS.items()
        if (jobs := [job for job in final_jobs(problem, method, results, seeds) if job in results])
    }


def relative_changes(problem: Problem, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return how much better than one network per task every metric is, in percent. Shape ``(seeds, n)``."""
    singles = metrics[SINGLE_TASK]
    signs = torch.tensor([1.0 if higher else -1.0 for higher in _signs(problem)])
    unit = singles.mean(dim=0).abs()  # not each seed's own: a mean of ratios is biased by the noise of the denominator
    return {name: 100 * signs * (values - singles[: len(values)]) / unit for name, values in metrics.items()}


def clipped(changes: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean change of every method, metrics clipped to :data:`LIMIT`; minus infinity if not finite."""
    return {name: clipped_of(of).mean().item() for name, of in changes.items()}


def _signs(problem: Problem) -> list[bool]:
    return [metric.higher_is_better for metric in problem.metrics]


def _table(problem: Problem, metrics: dict[str, Tensor], changes: dict[str, Tensor], results: Results) -> str:
    finite = {name: values.mean(dim=0) for name, values in metrics.items() if values.isfinite().all()}
    ranks = mean_rank(finite, _signs(problem))
    columns = [*(metric.name for metric in problem.metrics), "Delta-m, %", "mean rank", "learning rates", "ms"]
    lines = [f"### {problem.name}", "", _row("method", columns), "|---|" + "---:|" * len(columns)]
    for name, values in metrics.items():
        cells = [plus_minus(column) for column in values.T]
        change = plus_minus(changes[name].mean(dim=1), sign="+") if name != SINGLE_TASK else ""
        rank = f"{ranks[name]:.1f}" if name in ranks else ""
        cells += [change, rank, _learning_rates(problem, METHODS[name], results)]
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
    """Return the table of all methods, with their ranks, and the one of what becomes of the default without a part."""
    methods = [name for name in METHODS if name != SINGLE_TASK and any(name in of for of in changes.values())]
    ranked = [name for name in methods if not METHODS[name].variant and all(name in of for of in changes.values())]
    scores = {problem: clipped({name: of[name] for name in ranked}) for problem, of in changes.items()}
    ranks = torch.stack([_ranks([clipped_of(of[name]) for name in ranked]) for of in changes.values()]).mean(dim=0)
    lines = [
        _row("method", [*changes, "mean rank", "behind the best, at worst"]),
        "|---|" + "---:|" * (len(changes) + 2),
    ]
    variants = [_row("", changes), "|---|" + "---:|" * len(changes)]
    for name in methods:
        cells = [plus_minus(of[name].mean(dim=1), sign="+") if name in of else "" for of in changes.values()]
        if METHODS[name].variant or name == DEFAULT:
            variants.append(_row(name, cells))
        if not METHODS[name].variant:
            known = name in ranked
            worst = max(max(of.values()) - of[name] for of in scores.values()) if known else math.nan
            cells += [plus_minus(ranks[ranked.index(name)]), f"{worst:.0f}"] if known else ["", ""]
            lines.append(_row(name, cells))
    return "\n".join(["### Delta-m, %", "", *lines, "", "### The parts of the default: Delta-m, %", "", *variants])


def clipped_of(changes: Tensor) -> Tensor:
    """Return the mean change in every seed, metrics clipped to :data:`LIMIT`. ``(seeds, n)`` to ``(seeds,)``."""
    return changes.clamp(-LIMIT, LIMIT).mean(dim=1).nan_to_num(-torch.inf)


def _ranks(scores: Sequence[Tensor]) -> Tensor:
    """Return the ranks of the methods in every seed, 1 for the best. n times ``(seeds,)`` to ``(n, seeds)``."""
    stacked = torch.stack(list(scores))
    return 1.0 + (stacked[None] > stacked[:, None]).sum(dim=1)


def _untuned(problems: Sequence[Problem], results: Results) -> str:
    """Return how far methods are ahead of the plain sum at the learning rate that is best for that."""
    lines = ["### Ahead of the plain sum, not tuned, %", "", _row("method", [problem.name for problem in problems])]
    lines.append("|---|" + "---:|" * len(problems))
    for name, method in METHODS.items():
        if method.own is not None or name in (SINGLE_TASK, PLAIN_SUM):
            continue
        cells = []
        for problem in problems:
            setting, compared = choose(problem, METHODS[PLAIN_SUM], results), (SINGLE_TASK, PLAIN_SUM, name)
            factor = math.nan if setting is None else setting.factor  # of which there are no results
            jobs = {of: [Job(problem.name, of, factor, None, seed) for seed in SEARCH_SEEDS] for of in compared}
            if any(job not in results for of in jobs.values() for job in of):
                cells.append("")
                continue
            metrics = {of: torch.tensor([results[job] for job in jobs[of]], dtype=torch.float64) for of in compared}
            changes = relative_changes(problem, metrics)
            cells.append(plus_minus((changes[name] - changes[PLAIN_SUM]).mean(dim=1), sign="+"))
        if any(cells):
            lines.append(_row(name, cells))
    return "\n".join(lines)


def plus_minus(values: Tensor, sign: str = "") -> str:
    """Write one number per seed as mean and standard error, in three digits."""
    mean = values.mean().item()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    size = max(abs(mean), abs(error) if math.isfinite(error) else 0.0)
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{mean:{sign}.{digits}f}\u00a0±\u00a0{error:.{digits}f}"  # one line in a narrow column


def _row(first: str, rest: Iterable[str]) -> str:
    return "| " + " | ".join([first, *rest]) + " |"
