"""The table of the unseen problems, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rotoopt.comparison import Comparison
from rotoopt.comparison._statistics import LIMIT, clip
from rotoopt.comparison._table import cell, row, rule
from tests.benchmarks.unseen import PROBLEMS
from tests.benchmarks.unseen.training import METHODS, PLAIN_SUM

LEAST = 1e-12  # an error of zero has no logarithm


def log_changes(comparison: Comparison, method: str) -> Tensor:
    """Return the logarithm of the errors of the plain sum minus that of a method's, in percent, paired by seed.

    A halved error is +69 %. Changes are clipped to 100 %; a run that diverged counts as -100 %.

    Returns:
        Means over the errors. Shape ``(seeds,)``, NaN if the method was not run.
    """
    if method not in comparison.metrics:
        return torch.full((len(comparison.seeds),), math.nan)
    plain, errors = (
        torch.stack(list(comparison.metrics[name].values()), dim=1).clamp_min(LEAST) for name in (PLAIN_SUM, method)
    )
    return clip(100 * (plain.log() - errors.log())).mean(dim=1)


def markdown(comparisons: Mapping[str, Comparison]) -> str:
    """Return the table: one row per problem, with means over seeds, and one with means over problems."""
    methods = [name for name in METHODS if name != PLAIN_SUM]
    lines = [row("problem", [*methods, "what it is"]), rule(len(methods)) + "---|"]
    means = []
    for name, comparison in comparisons.items():
        changes = [log_changes(comparison, method) for method in methods]
        lines.append(row(name, [*(cell(of, sign="+") for of in changes), PROBLEMS[name].about]))
        means.append(torch.stack([of.mean() for of in changes]))
    lines.append(row("mean over problems", [*(cell(of, sign="+") for of in torch.stack(means).T), ""]))
    return "\n".join(
        [
            *lines,
            "",
            "100 log(error of the plain sum / error), mean over the errors of a problem, each clipped to "
            f"{LIMIT:.0f} %; positive is better. Mean ± standard error over seeds; in the last row, over problems.",
        ]
    )
