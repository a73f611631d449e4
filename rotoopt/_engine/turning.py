"""What the rotations turn by: unit gradients of the tasks, from where the gradients met."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rotoopt._capture.fork import BackwardPass, Met
from rotoopt._capture.representation import RotatedDims
from rotoopt._rotation.step import RotationGradient
from rotoopt.weighting import Measurements


def rotation_gradients(
    passes: Sequence[BackwardPass], measured: Measurements, magnified: Sequence[Tensor | float], dims: RotatedDims
) -> list[RotationGradient]:
    """Return the gradients of the rotations, which add up.

    Passes whose weights were known are parts of one batch: their gradients are divided by the norms of all together.
    Others were weighed one by one, and the rotations turn by their mean.

    Args:
        passes: The backward passes of a step.
        measured: What all of them measured together.
        magnified: By how much the gradients of each pass are larger than those that it measured.
        dims: The rotated dimensions.
    """
    exact = [this.measured.finite for this in passes if not this.lagged and this.measured is not None]
    share = 1.0 / torch.stack(exact).sum().clamp(min=1).to(measured.norms) if exact else 1.0
    found = []
    for this, factor in zip(passes, magnified, strict=True):
        for met in filter(lambda met: met.rotated, this.met):
            assert this.measured is not None
            usable = this.measured.finite
            if this.lagged:
                directions = met.gradients.divided(measured.norms * factor)
                target = directions.sum(0) / measured.present.sum()
            else:
                directions = met.gradients.directions()
                target = directions.sum(0) / met.gradients.num_present
                directions = directions * share
            directions, target = torch.where(usable, directions, 0.0), torch.where(usable, target, 0.0)
            stacked = dims.view_stacked(directions.view(-1, *met.shape))
            found.append(RotationGradient(stacked, dims.view(target.view(met.shape)), usable))
    return found


def partial_cosines(met: Sequence[Met], norms: Tensor) -> Tensor | None:
    """Return the cosines of gradients with these ``norms``, as far as they met; None where none did. ``(K, K)``."""
    if not met:
        return None
    total = torch.zeros_like(met[0].gradients.gram)
    for each in met:
        own = each.gradients
        shares = torch.where(norms > 0, own.norms / norms, 0.0)
        total = total + shares[:, None] * own.cosines * shares
    return total
