"""Gradients of the rotations: unit gradients of the tasks, where gradients were collected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rotoopt._capture.backward_pass import BackwardPass, Met
from rotoopt._capture.representation import RotatedDims
from rotoopt._rotation.rotations import Rotations
from rotoopt._rotation.step import RotationGradient
from rotoopt.weighting import Measurements


def rotation_gradients(
    passes: Sequence[BackwardPass],
    measured: Measurements,
    tasks: Sequence[set[int]],
    dims: RotatedDims,
    rotations: Rotations,
) -> list[RotationGradient]:
    """Return the gradients of the rotations in a step, to be added.

    If the weights were known beforehand, all passes are parts of one batch: their gradients are divided by the joint
    norms. Otherwise every pass was weighted on its own, and the result is the mean over the usable passes.

    Args:
        passes: The backward passes of the step.
        measured: Their joint measurements.
        tasks: The tasks of each, on any process. A single one has nothing to align with.
        dims: The rotated dimensions.
        rotations: The rotations. In the first step, tensors of another size may have been rotated before.
    """
    size = rotations.size
    if size is None:
        return []
    num_usable = _num_usable([this for this in passes if not this.lagged])
    gradients = []
    for this, together in zip(passes, tasks, strict=False):
        if len(together) > 1:
            gradients += [
                _of_batch(met, this, measured, dims) if this.lagged else _of_pass(met, this, num_usable, dims)
                for met in this.met
                if met.turns and dims.fit(met.shape, size, all_of_them=rotations.covers_all)
            ]
            moments = [moment for moment in this.lone_moments if len(moment) == size]
            gradients += [_of_lone(moment, this, len(measured.norms)) for moment in moments]
    return gradients


def _num_usable(passes: Sequence[BackwardPass]) -> Tensor | None:
    """Return the number of usable ``passes``; None for one. Shape ``()``."""
    usable = [this.measured.finite for this in passes if this.measured is not None]
    return None if len(usable) <= 1 else torch.stack(usable).sum().clamp(min=1)


def _of_batch(met: Met, this: BackwardPass, measured: Measurements, dims: RotatedDims) -> RotationGradient:
    norms = measured.norms if this.magnified is None else measured.norms * this.magnified
    unusable = _unusable(this)
    directions = met.gradients.divided(norms).masked_fill_(unusable, 0.0)
    if len(met.gradients.tasks or ()) == len(norms):
        target = directions.mean(0)
    else:
        target = directions.sum(0) / measured.present.sum()
    return _factors(directions, target, unusable, met, this, dims)


def _of_pass(met: Met, this: BackwardPass, num_usable: Tensor | None, dims: RotatedDims) -> RotationGradient:
    unusable = _unusable(this)
    directions = met.gradients.directions().masked_fill_(unusable, 0.0)
    target = directions.sum(0) / met.gradients.num_present
    target = target if num_usable is None else target / num_usable
    return _factors(directions, target, unusable, met, this, dims)


def _of_lone(moment: Tensor, this: BackwardPass, num_tasks: int) -> RotationGradient:
    """Return the gradient for a tensor that a single task reads: zero, but its input is part of the metric."""
    none = RotationGradient.none(num_tasks, len(moment), like=moment)
    return replace(none, second_moment=moment.masked_fill(_unusable(this), 0.0))


def _factors(
    directions: Tensor, target: Tensor, unusable: Tensor, met: Met, this: BackwardPass, dims: RotatedDims
) -> RotationGradient:
    assert this.measured is not None  # it is closed
    return RotationGradient(
        dims.view_stacked(directions.view(len(directions), *met.shape)),
        dims.view(target.view(met.shape)),
        this.measured.finite,
        None if met.second_moment is None else met.second_moment.masked_fill(unusable, 0.0),
    )


def _unusable(this: BackwardPass) -> Tensor:
    """Return whether something in the pass was not finite, so that its measurements are zeros."""
    assert this.measured is not None
    return ~this.measured.finite


def cosines_of(this: BackwardPass, norms: Tensor) -> Tensor:
    """Return the cosines of the gradients of ``this``, with these ``norms``. Shape ``(K, K)``."""
    met = this.met
    # The common case: all gradients were collected at one tensor.
    if len(met) == 1 and met[0].gradients.tasks == tuple(sorted(this.tasks)) and this.read_one_tensor:
        return met[0].gradients.cosines.to(norms)
    return partial_cosines(met, norms)


def partial_cosines(met: Sequence[Met], norms: Tensor) -> Tensor:
    """Return the cosines of gradients with these ``norms``; parts at different tensors are orthogonal. ``(K, K)``.

    Args:
        met: Gradients that were collected, each at one tensor.
        norms: Norms of the gradients at all tensors jointly. Shape ``(K,)``.
    """
    total, alone = torch.zeros_like(norms.outer(norms)), (norms > 0).to(norms)
    for each in met:
        shares = torch.where(norms > 0, each.gradients.norms.to(norms) / norms, 0.0)
        total = total + shares[:, None] * each.gradients.cosines.to(norms) * shares
        alone = alone - shares.square()  # the share of tensors that no other task reads
    return total + alone.clamp(min=0.0).diag()
