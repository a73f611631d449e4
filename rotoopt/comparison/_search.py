"""Search: the choice of a learning rate for each candidate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rotoopt.comparison._statistics import clip, relative_changes


def yardstick(baseline: Mapping[float, Tensor]) -> Tensor:
    """Return the reference of the search: the median over the baseline's learning rates of its means over seeds.

    Args:
        baseline: The metrics of the baseline by learning rate, NaN where a run failed. Shape ``(seeds, n)`` each.

    Returns:
        Shape ``(n,)``, NaN for a metric without any finite value.
    """
    means = torch.stack([values.mean(dim=0) for values in baseline.values()])
    return means.where(means.isfinite(), torch.nan).nanmedian(dim=0).values


def choose_lr(candidate: Mapping[float, Tensor], reference: Tensor, signs: Tensor) -> float:
    """Return the learning rate with the best mean change of the metrics, each clipped to 100 %.

    A run that failed counts as -100 %.

    Args:
        candidate: Its metrics by learning rate, NaN where a run failed. Shape ``(seeds, n)`` each.
        reference: The reference of the changes. Shape ``(n,)``.
        signs: 1 where higher is better and -1 where lower is. Shape ``(n,)``.

    Example:
        >>> accuracy = {0.1: torch.tensor([[0.7], [0.8]]), 1.0: torch.tensor([[0.9], [torch.nan]])}
        >>> choose_lr(accuracy, torch.tensor([0.5]), torch.tensor([1.0]))
        0.1
    """
    scores = {
        lr: clip(relative_changes(values, reference.expand_as(values), signs)).mean().item()
        for lr, values in candidate.items()
    }
    return max(scores, key=scores.__getitem__)
