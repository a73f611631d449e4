"""Harm: do the rotations, by the record, make training worse?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotoopt.diagnostics.measurements import pairs

WINDOW = 1000  # records
NUM_BLOCKS = 20
SIGNIFICANT = 4.0  # standard deviations: reached by chance in 1 of 100,000 random orders of 20 blocks, in one direction
RISING = 2.0
# Radians in a window. In examples/digit_pairs.py (40 epochs), the default turns by at most 0.03, and Adam with 1e-4 by
# 0.41, at the cost of one task. All that turned by 1.7 or more (Adam with 1e-3, 1e-2, SGD with 1) spoilt the network.
MIN_TURN = 0.5
# Smaller trends are real, but no harm: in that example without any rotations, the mean cosine falls by 0.004 in a
# window, four standard deviations.
MIN_FALL = 0.05
MIN_RISE = 0.1  # of the losses, as a share of their mean


def harm(values: dict[str, Tensor], *, network_lr: float) -> str | None:
    """Return a warning if the rotations seem to do harm, and None otherwise.

    They are blamed only if one of them turned by half a radian or more within the window, and, meanwhile,

    - the cosines between the gradients of different tasks, which rotations are to raise, fell by 0.05 or more;
    - the losses rose, by a tenth or more: the heads cannot follow; or
    - the cosines did not rise, although the learning rate of the rotations is above that of the network. The method
      asks for one below (RotoGrad, ICLR 2022, section 4).

    Whether something falls or rises is decided by the trend test of Mann and Kendall on the means of 20 successive
    blocks: the number of pairs of blocks in ascending order, less that in descending order, must be 4 standard
    deviations or more from zero. That assumes nothing about the distribution of the noise, only that it has no memory
    beyond a block of 50 records. The probability of a false trend is 0.00001 in one test, so that in 100,000 steps of
    noise, 1000 overlapping windows with two tests each, it is 0.02 at most, and the size of the trend, the turn of the
    rotations must be large, too. The third sign is no test: there, the learning rate is what speaks against them.

    Args:
        values: Stacked measurements of the window, as from :meth:`History.to_dict`.
        network_lr: The largest learning rate of the network, NaN if not known.

    Source: Mann, Nonparametric tests against trend, Econometrica 1945; Kendall, Rank Correlation Methods, 1975.
    """
    turn = values["angles"].sum(dim=0).amax().item()
    if not turn >= MIN_TURN:
        return None
    cosines, losses = _mean_cosine(values["cosines"]), _mean_loss(values["losses"])
    rotation_lr = values["rotation_lr"][-1].item()
    above = rotation_lr > network_lr
    seen = []
    if trend(cosines) <= -SIGNIFICANT and _change(cosines) <= -MIN_FALL:
        seen.append(f"the mean cosine between task gradients fell {_from_to(cosines)}")
    if trend(losses) >= SIGNIFICANT and _change(losses) >= MIN_RISE:
        seen.append(f"the losses rose by {_change(losses):.0%} of their mean")
    if above and not seen and trend(cosines) < RISING:
        seen.append(f"the mean cosine between task gradients did not rise ({_from_to(cosines)})")
    if not seen:
        return None
    first, last = values["step"][[0, -1]].tolist()
    compared = f", above the network's {network_lr:.3g}" if above else ""
    return (
        "Rotations should make task gradients agree while the heads keep up with them, got rotations that turned by up "
        f"to {turn:.1f} radians from step {first} to step {last}, while {' and '.join(seen)}. Their learning rate is "
        f"{rotation_lr:.3g}{compared}. Lower it (`rotation_lr`, or that of your `rotation_optimizer`), or compare with "
        "rotate=False."
    )


def trend(blocks: Tensor) -> float:
    """Return the statistic of Mann and Kendall in standard deviations: positive if ``blocks`` (n,) rise.

    Example:
        >>> round(trend(torch.arange(20.0)), 2), round(trend(-torch.arange(20.0)), 2), trend(torch.ones(20))
        (6.16, -6.16, 0.0)
    """
    if not blocks.isfinite().all():
        return math.nan  # nothing was measured
    n = len(blocks)
    ascending = (blocks - blocks[:, None]).sign().triu(diagonal=1).sum().item()
    return ascending / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)


def _block_means(series: Tensor) -> Tensor:
    """Mean of what is finite in every block. ``(T, n)`` to ``(NUM_BLOCKS, n)``, without what some block lacks."""
    finite = torch.where(series.isfinite(), series.double(), torch.nan)
    means = torch.stack([block.nanmean(dim=0) for block in finite.tensor_split(NUM_BLOCKS)])
    return means[:, means.isfinite().all(dim=0)]


def _mean_cosine(cosines: Tensor) -> Tensor:
    """Mean over the pairs of tasks: the alignment of a task would change with the number of those that are present."""
    i, j = torch.tensor(pairs(cosines.shape[-1]), dtype=torch.long).view(-1, 2).unbind(dim=1)
    return _block_means(cosines[:, i, j]).mean(dim=1)


def _mean_loss(losses: Tensor) -> Tensor:
    """Mean over the tasks, each relative to its mean."""
    blocks = _block_means(losses)
    return (blocks / blocks.abs().mean(dim=0)).mean(dim=1)


def _change(blocks: Tensor) -> float:
    """From the first quarter to the last."""
    quarter = len(blocks) // 4
    return (blocks[-quarter:].mean() - blocks[:quarter].mean()).item()


def _from_to(blocks: Tensor) -> str:
    quarter = len(blocks) // 4
    return f"from {blocks[:quarter].mean():.2f} to {blocks[-quarter:].mean():.2f}"
