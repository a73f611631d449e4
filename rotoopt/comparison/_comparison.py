"""Comparison: the results of the candidates, as numbers, a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotoopt.comparison._picture import draw
from rotoopt.comparison._statistics import clip, relative_changes
from rotoopt.comparison._table import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Baseline = str | Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """The results of every candidate with every seed. Print it for the table.

    Attributes:
        metrics: By candidate and metric, one number per seed; NaN where the run diverged or failed. Shape ``(seeds,)``
            each.
        higher_is_better: Whether higher is better, for each metric.
        seeds: The seeds, in order.
        baseline: The reference of Delta-m: a candidate, or numbers.
        ms_per_step: Milliseconds per step, by candidate and seed; NaN where not measured. Shape ``(seeds,)`` each.
        learning_rates: The chosen learning rate, by candidate; empty if there was no choice.
        failures: Error messages, by candidate and seed.

    Example:
        >>> result = Comparison(
        ...     metrics={
        ...         "plain sum": {"accuracy": torch.tensor([0.6, 0.7]), "error": torch.tensor([0.5, 0.4])},
        ...         "default": {"accuracy": torch.tensor([0.8, 0.8]), "error": torch.tensor([0.4, 0.4])},
        ...     },
        ...     higher_is_better={"accuracy": True, "error": False},
        ...     seeds=(0, 1),
        ...     baseline="plain sum",
        ... )
        >>> print(result)
        | candidate |    accuracy ↑ |       error ↓ |  Delta-m, % |
        |-----------|--------------:|--------------:|------------:|
        | plain sum | 0.650 ± 0.050 | 0.450 ± 0.050 |           0 |
        | default   | 0.800 ± 0.000 | 0.400 ± 0.000 | +17.1 ± 9.4 |
        <BLANKLINE>
        Mean ± standard error, 2 seeds.
        Delta-m: mean change of the metrics relative to plain sum, paired by seed; positive is better.
        >>> result.delta_m("default")
        tensor([26.4957,  7.6923], dtype=torch.float64)
    """

    metrics: Mapping[str, Mapping[str, Tensor]]
    higher_is_better: Mapping[str, bool]
    seeds: tuple[int, ...]
    baseline: Baseline
    ms_per_step: Mapping[str, Tensor] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[tuple[str, int], str] = field(default_factory=dict)

    def against(self, baseline: Baseline) -> Comparison:
        """Return the same results with another baseline: ``result.against("default")``.

        Args:
            baseline: A candidate, or one number per metric, such as those of one network per task.

        Raises:
            ValueError: If there is no such candidate, or a metric has no number.
        """
        check_baseline(baseline, self.metrics, self.higher_is_better)
        return replace(self, baseline=baseline)

    def changes(self, candidate: str) -> Tensor:
        """Return by how many percent every metric is better than the baseline's, paired by seed.

        Args:
            candidate: Its name.

        Returns:
            Shape ``(seeds, n)``, metrics in the order of `higher_is_better`. Relative to the mean of the baseline over
            the seeds. NaN if one of the two runs failed or diverged.
        """
        signs = torch.tensor([1.0 if higher else -1.0 for higher in self.higher_is_better.values()])
        return relative_changes(self._values(candidate), self._reference(), signs)

    def delta_m(self, candidate: str, *, clipped: bool = False) -> Tensor:
        """Return Delta-m of every seed: the mean change of the metrics against the baseline, in percent.

        Positive is better; see :func:`~rotoopt.diagnostics.mean_relative_change`.

        Args:
            candidate: Its name.
            clipped: Limit the change of every metric to 100 %, so that a metric with a baseline near zero does not
                dominate; a run that diverged counts as -100 %.

        Returns:
            Shape ``(seeds,)``. NaN if one of the two runs failed or the baseline's diverged; without ``clipped``, also
            if the candidate's diverged.
        """
        changes = self.changes(candidate)
        if not clipped:
            return changes.mean(dim=1)
        failed = torch.tensor([(candidate, seed) in self.failures for seed in self.seeds])
        unknown = failed | ~self._reference().isfinite().all(dim=1)
        return clip(changes).mean(dim=1).where(~unknown, torch.nan)

    def to_markdown(self) -> str:
        """Return the table, with notes on its columns and on failed runs."""
        return markdown(self)

    def plot(self) -> Figure:
        """Plot Delta-m and the change of every metric for all candidates: seeds, means and standard errors.

        Changes are clipped to 100 %.

        Returns:
            A figure of ``matplotlib.pyplot`` with a transparent background. Save it with ``figure.savefig(path)``.

        Raises:
            ImportError: If matplotlib is not installed (``pip install 'rotoopt[plot]'``).
        """
        return draw(self)

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:  # shown by notebooks
        return self.to_markdown()

    def _values(self, candidate: str) -> Tensor:
        of_metrics = self.metrics[candidate]
        return torch.stack([of_metrics[name].double() for name in self.higher_is_better], dim=1)  # (seeds, n)

    def _reference(self) -> Tensor:
        if isinstance(self.baseline, str):
            return self._values(self.baseline)
        numbers = torch.tensor([float(self.baseline[name]) for name in self.higher_is_better], dtype=torch.float64)
        return numbers.expand(len(self.seeds), -1)


def check_baseline(baseline: Baseline, candidates: Mapping[str, object], higher_is_better: Mapping[str, bool]) -> None:
    """Raise if ``baseline`` cannot be a reference.

    Raises:
        ValueError: If there is no such candidate, or a metric has no number.
    """
    if isinstance(baseline, str):
        if baseline not in candidates:
            raise ValueError(
                f"`baseline` must be one of the candidates, {', '.join(candidates)}, or a number for every metric, got "
                f"{baseline!r}."
            )
    elif set(baseline) != set(higher_is_better):
        raise ValueError(
            f"`baseline` must have a number for every metric, {', '.join(higher_is_better)}, got "
            f"{', '.join(baseline) or 'none'}."
        )
