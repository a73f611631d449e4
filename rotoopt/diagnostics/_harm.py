"""Harm: whether the rotations seem to make training worse."""

from __future__ import annotations

import torch
from torch import Tensor

from rotoopt.diagnostics._measurements import pairs

WINDOW = 1000  # records
# Radians within the window. In examples/digit_pairs.py (40 epochs), rotations turn by at most 0.47 by default, and by
# 0.41 with Adam at 1e-4, which costs one task. All optimizers that turned them by 1.7 or more (Adam with 1e-3 and
# 1e-2, SGD with 1) made the network worse.
MIN_TURN = 1.0
# Changes from one half of the window to the other. Single records have a noise of 0.2 in both; means over half a
# window have much less.
MIN_FALL = 0.2  # of the mean cosine
MIN_RISE = 0.2  # of the losses, as a share of their mean


def harm(values: dict[str, Tensor], *, network_lr: float) -> str | None:
    """Return a warning if the rotations seem to be harmful, and None otherwise.

    They are reported only if one of them turned by a radian or more within the window, and, from its first half to
    its second,

    - the mean cosine between the gradients of different tasks, which rotations should raise, fell by 0.2 or more;
    - the losses rose by a fifth or more: the heads cannot follow; or
    - the mean cosine did not rise, although the learning rate of a rotation optimizer is above that of the network.
      The method requires a lower one (RotoGrad, ICLR 2022, section 4).

    Args:
        values: Stacked measurements of the window, as from :meth:`History.to_dict`.
        network_lr: The largest learning rate of the network, NaN if it is not comparable with that of the rotations.
    """
    turn = values["angles"].sum(dim=0).amax().item()
    if not turn >= MIN_TURN:
        return None
    before, after = _mean_cosines(values["cosines"])
    rise = _rise(values["losses"])
    rotation_lr = values["rotation_lr"][-1].item()
    above = rotation_lr > network_lr
    seen = []
    if before - after >= MIN_FALL:
        seen.append(f"the mean cosine between task gradients fell from {before:.2f} to {after:.2f}")
    if rise >= MIN_RISE:
        seen.append(f"the losses rose by {rise:.0%} of their mean")
    if above and not seen and after <= before:
        seen.append(f"the mean cosine between task gradients did not rise (from {before:.2f} to {after:.2f})")
    if not seen:
        return None
    first, last = values["step"][[0, -1]].tolist()
    compared = f", above the network's {network_lr:.3g}" if above else ""
    return (
        "Rotations should align task gradients, slowly enough for the heads to follow, got rotations that turned by up "
        f"to {turn:.1f} radians from step {first} to step {last}, while {' and '.join(seen)}. Their learning rate is "
        f"{rotation_lr:.3g}{compared}. Lower it (`rotation_lr`, or that of your `rotation_optimizer`), or compare with "
        "rotate=False."
    )


def _mean_cosines(cosines: Tensor) -> tuple[float, float]:
    """Return the mean over the pairs of tasks in both halves of the window; NaN for a single task.

    The alignment would not do: that of a task changes with the number of tasks that are present.
    """
    i, j = torch.tensor(pairs(cosines.shape[-1]), dtype=torch.long).view(-1, 2).unbind(dim=1)
    before, after = _half_means(cosines[:, i, j]).mean(dim=1).tolist()
    return before, after


def _rise(losses: Tensor) -> float:
    """Return by how much the losses rose, each relative to its mean, on average over the tasks."""
    halves = _half_means(losses)
    before, after = (halves / halves.abs().mean(dim=0)).mean(dim=1).tolist()
    return float(after - before)


def _half_means(series: Tensor) -> Tensor:
    """Return the mean of the finite values in each half. ``(T, n)`` to ``(2, n)``, without columns that lack one."""
    finite = torch.where(series.isfinite(), series.double(), torch.nan)
    means = torch.stack([half.nanmean(dim=0) for half in finite.tensor_split(2)])
    return means[:, means.isfinite().all(dim=0)]
