"""Statistics: paired differences between a candidate and a baseline, and their standard errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIMIT = 100.0  # percent, to which the change of a metric is clipped so that none dominates


def relative_changes(values: Tensor, reference: Tensor, signs: Tensor) -> Tensor:
    r"""Return by how many percent every metric is better than the reference, for each seed.

    .. math:: 100 \, s_i \frac{M_{r,i} - B_{r,i}}{|\bar B_i|}

    for seeds r and metrics i, where :math:`\bar B` is the mean of the reference over the seeds: ratios to each seed's
    own reference would be biased by noise in the denominator.

    Args:
        values: M. Shape ``(seeds, n)``.
        reference: B, for the same or more seeds. Shape ``(seeds, n)``.
        signs: s, 1 where higher is better and -1 where lower is. Shape ``(n,)``.

    Returns:
        Percent. Shape ``(seeds, n)``, NaN where a value or its reference is not finite, infinite where the mean of the
        reference is zero and the value is not.

    Example:
        >>> relative_changes(torch.tensor([[0.6, 1.0]]), torch.tensor([[0.5, 2.0]]), torch.tensor([1.0, -1.0]))
        tensor([[20., 50.]])
    """
    finite = reference.isfinite()
    unit = torch.where(finite, reference, 0.0).sum(dim=0) / finite.sum(dim=0)
    ahead = signs * (values - reference[: len(values)])
    return torch.where(ahead == 0, 0.0, 100 * ahead / unit.abs()).where(ahead.isfinite(), torch.nan)


def clip(changes: Tensor) -> Tensor:
    """Return changes limited to 100 %, so that a metric with a reference near zero does not dominate.

    A value that is not finite, because a run diverged, counts as -100 %.
    """
    return changes.clamp(-LIMIT, LIMIT).nan_to_num(-LIMIT)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of the finite values over seeds and its standard error; NaN where unknown.

    Args:
        values: Shape ``(seeds,)``.

    Example:
        >>> mean_and_error(torch.tensor([1.0, 3.0, torch.nan]))
        (2.0, 1.0)
    """
    finite = values[values.isfinite()]
    error = finite.std().item() / math.sqrt(len(finite)) if len(finite) > 1 else math.nan
    return finite.mean().item(), error
