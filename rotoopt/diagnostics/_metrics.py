"""Metrics: the quality of a multi-task network in one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Values = Sequence[float] | Tensor


def mean_relative_change(multi_task: Values, single_task: Values, higher_is_better: Sequence[bool]) -> float:
    r"""Return the field's :math:`\Delta_m`: the mean change against single-task networks, in percent.

    .. math:: \Delta_m = \frac{100}{n} \sum_{i=1}^n s_i \frac{M_i - B_i}{|B_i|}

    with :math:`s_i = 1` where higher is better and -1 otherwise, so **positive is better than one network per task**.
    Some papers, Nash-MTL and FAMO among them, publish the opposite sign.

    Args:
        multi_task: M, the metrics of the network of all tasks. Shape ``(n,)``.
        single_task: B, the same metrics of one network per task. Shape ``(n,)``.
        higher_is_better: One flag per metric.

    Returns:
        Percent. All metrics have equal weight. If a task has several, average over its metrics first to weight tasks
        equally.

    Raises:
        ValueError: If shapes do not match, a value is not finite, or a reference is zero.

    Example:
        Two points less in accuracy, and half of the error:

        >>> mean_relative_change([0.78, 1.5], [0.80, 3.0], higher_is_better=[True, False])
        23.75

    Source: Maninis, Radosavovic and Kokkinos, Attentive Single-Tasking of Multiple Tasks, CVPR 2019; there without the
    absolute value, which only matters for negative metrics.
    """
    values = _metrics("multi_task", multi_task)
    references = _metrics("single_task", single_task)
    signs = _signs(higher_is_better)
    if not len(values) == len(references) == len(signs):
        raise ValueError(
            "`multi_task`, `single_task` and `higher_is_better` must have one entry per metric, got "
            f"{len(values)}, {len(references)} and {len(signs)}."
        )
    if (references == 0).any():
        raise ValueError(
            f"`single_task` must not be zero, got {references.tolist()}. There is no change relative to zero; use "
            "another metric, such as the error instead of the accuracy."
        )
    return float(100 * (signs * (values - references) / references.abs()).mean())


def mean_rank(results: Mapping[str, Values], higher_is_better: Sequence[bool]) -> dict[str, float]:
    """Return the rank of every method, 1 for the best, averaged over the metrics.

    Equal values share the mean of their ranks. A rank depends on which methods are compared.

    Args:
        results: The metrics of every method, by its name. Shape ``(n,)`` each.
        higher_is_better: One flag per metric.

    Raises:
        ValueError: If shapes do not match, or a value is not finite.

    Example:
        >>> mean_rank({"plain sum": [0.7, 3.3], "RotoGrad": [0.9, 4.0]}, higher_is_better=[True, False])
        {'plain sum': 1.5, 'RotoGrad': 1.5}
        >>> mean_rank({"a": [0.9], "b": [0.9], "c": [0.8]}, higher_is_better=[True])
        {'a': 1.5, 'b': 1.5, 'c': 3.0}
    """
    signs = _signs(higher_is_better)
    rows = [_metrics(f"results[{name!r}]", values) for name, values in results.items()]
    for name, row in zip(results, rows, strict=True):
        if len(row) != len(signs):
            raise ValueError(
                f"`results` must have one entry per flag of `higher_is_better`, got {len(row)} for {name} and "
                f"{len(signs)} flags."
            )
    if not rows:
        raise ValueError("`results` must have at least one method, got none.")
    scores = signs * torch.stack(rows)  # (methods, n)
    better = (scores > scores[:, None]).sum(dim=1)
    equal = (scores == scores[:, None]).sum(dim=1)
    ranks = better + (equal + 1) / 2
    return dict(zip(results, ranks.mean(dim=1).tolist(), strict=True))


def _metrics(name: str, values: Values) -> Tensor:
    metrics = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if metrics.dim() != 1 or len(metrics) == 0:
        raise ValueError(
            f"`{name}` must be a sequence of metrics, got shape {tuple(metrics.shape)}. Call this once per seed."
        )
    if not metrics.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got {metrics.tolist()}.")
    return metrics


def _signs(higher_is_better: Sequence[bool]) -> Tensor:
    if isinstance(higher_is_better, bool) or not all(isinstance(flag, bool) for flag in higher_is_better):
        raise ValueError(f"`higher_is_better` must be one bool per metric, got {higher_is_better!r}.")
    return torch.tensor([1.0 if flag else -1.0 for flag in higher_is_better], dtype=torch.float64)
