"""The tables of the quality study, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tests.benchmarks.problems import PROBLEMS, Problem
from tests.benchmarks.quality_methods import METHOD_SETS, REFERENCE
from tests.benchmarks.quality_results import Run


def markdown(runs: Iterable[Run]) -> str:
    """Return one table per problem.

    Every cell is a mean over seeds and its standard error. The last columns are paired differences to scale only,
    on the same seeds; positive is better. An arrow marks a metric that differs
    by more than two standard errors, from five seeds on.
    """
    runs = list(runs)
    problems = [problem for name, problem in PROBLEMS.items() if any(run.problem == name for run in runs)]
    return "\n\n".join(_table(problem, [run for run in runs if run.problem == problem.name]) for problem in problems)


def _table(problem: Problem, runs: list[Run]) -> str:
    by_method: dict[str, dict[int, Tensor]] = {}
    seconds: dict[str, list[float]] = {}
    for run in runs:
        by_method.setdefault(run.method, {})[run.seed] = torch.tensor(run.metrics, dtype=torch.float64)
        seconds.setdefault(run.method, []).append(run.seconds)
    reference = by_method.get(REFERENCE, {})
    names = [metric.name for metric in problem.metrics]
    gains = ["Delta-m, %", "median task, %"] if problem.relative else [f"gain, {name}" for name in names]
    lines = [
        f"**{problem.name}**",
        "",
        "| " + " | ".join(["method", "seeds", *names, *gains, "s"]) + " |",
        "|---|" + "---:|" * (len(names) + len(gains) + 2),
    ]
    for method in METHOD_SETS[problem.methods]:
        if method.name not in by_method:
            continue
        own = by_method[method.name]
        values = torch.stack(list(own.values()))  # (S, M)
        paired = sorted(own.keys() & reference.keys())
        gain = _gains(problem, own, reference, paired)  # (S, M)
        arrows = _arrows(gain)
        cells = [f"{plus_minus(values[:, k])}{arrows[k]}" for k in range(len(names))]
        # One task may dominate the mean: that of the errors closest to zero.
        summary = torch.stack([gain.mean(dim=1), gain.quantile(0.5, dim=1)], dim=1) if problem.relative else gain
        if method.name == REFERENCE or not paired:
            cells += ["" for _ in gains]
        else:
            cells += [plus_minus(summary[:, k], sign="+") for k in range(len(gains))]
        median = torch.tensor(seconds[method.name]).median()
        lines.append("| " + " | ".join([method.name, str(len(own)), *cells, f"{median:.1f}"]) + " |")
    return "\n".join(lines)


def _gains(problem: Problem, own: dict[int, Tensor], reference: dict[int, Tensor], seeds: list[int]) -> Tensor:
    """Return how much better than scale only every metric is, seed by seed: ``(S, M)``, in percent if relative.

    Percent of the mean of scale only over seeds, not of each seed's value: a mean of ratios is biased upwards by
    the noise of the denominator.
    """
    if not seeds:
        return torch.zeros(1, len(problem.metrics), dtype=torch.float64)
    others = torch.stack([reference[seed] for seed in seeds])
    signs = torch.tensor([1 if metric.higher_is_better else -1 for metric in problem.metrics])
    gain = signs * (torch.stack([own[seed] for seed in seeds]) - others)
    return 100 * gain / others.mean(dim=0).abs() if problem.relative else gain


def _arrows(gain: Tensor) -> list[str]:
    mean, error = gain.mean(dim=0), standard_error(gain)
    if len(gain) < 5:  # a standard error of so few is itself anyone's guess
        return ["" for _ in mean]
    return [" ▲" if m > 2 * e else " ▼" if m < -2 * e else "" for m, e in zip(mean, error, strict=True)]


def standard_error(values: Tensor) -> Tensor:
    """Return the standard error of the mean over the first dimension; NaN for a single value."""
    return values.std(dim=0) / math.sqrt(len(values)) if len(values) > 1 else torch.full_like(values[0], math.nan)


def plus_minus(values: Tensor, sign: str = "") -> str:
    """Write one number per seed as mean and standard error, in three digits."""
    mean, error = values.mean().item(), standard_error(values).item()
    size = max(abs(mean), abs(error) if math.isfinite(error) else 0.0)
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{mean:{sign}.{digits}f}\u00a0±\u00a0{error:.{digits}f}"  # one line in a narrow column
