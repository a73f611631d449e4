"""Agreement of the gradients of the samples in a batch: signal adds up over samples, noise does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotoopt._capture.representation import RotatedDims
from rotoopt._torch.autocast import without_autocast
from rotoopt._torch.processes import Processes
from rotoopt.weighting._measurements import root_sum_square

NUM_PROJECTIONS = 8  # of z, and of the gradients at z
ROUNDING = 1e-5  # upper bound of the relative error of an agreement


@dataclass(frozen=True)
class SampleSums:
    r"""Sums over samples b of :math:`A_{kb} = g_{kb} z_b^\top`, the gradient of a matrix in front of head k.

    They are linear in the gradients: parts of a batch can be added, and the scale of a ``GradScaler`` divided out.

    Attributes:
        sums: Random projections of :math:`\sum_b A_{kb}`. Shape ``(K, 64)``.
        lengths: :math:`(\sum_b \lVert A_{kb} \rVert^2)^{1/2}`, of the projections. Shape ``(K,)``.
        scale: The factor of both when they are combined with others. Shape ``(K,)`` or ``()``.
    """

    sums: Tensor
    lengths: Tensor
    scale: Tensor | float = 1.0

    @classmethod
    def none(cls, num_tasks: int, like: Tensor) -> SampleSums:
        """Return the sums of an empty batch, in the dtype of ``like``."""
        return cls(like.new_zeros(num_tasks, NUM_PROJECTIONS**2), like.new_zeros(num_tasks))

    def scaled(self, factor: Tensor | float) -> SampleSums:
        """Return the sums for gradients times ``factor``, a number or of shape ``(K,)``."""
        is_one = isinstance(self.scale, float) and self.scale == 1.0  # then there is nothing to multiply
        return replace(self, scale=factor if is_one else self.scale * factor)

    def multiplied(self) -> SampleSums:
        """Return the sums times their scale."""
        column = self.scale[:, None] if isinstance(self.scale, Tensor) and self.scale.ndim else self.scale
        return SampleSums(self.sums * column, self.lengths * self.scale)

    def where(self, usable: Tensor) -> SampleSums:
        """Return these sums if ``usable``, otherwise those of an empty batch. Shape ``()``, bool."""
        known = self.multiplied()
        return SampleSums(known.sums.masked_fill(~usable, 0.0), known.lengths.masked_fill(~usable, 0.0))

    def of_task(self, task: int, num_tasks: int) -> SampleSums:
        """Return these sums, which are of one task, as those of ``task`` among ``num_tasks``."""
        whole, own = SampleSums.none(num_tasks, self.sums), self.multiplied()
        whole.sums[task], whole.lengths[task] = own.sums[0], own.lengths[0]
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors, multiplied, which copies them."""
        known = self.multiplied()
        return {"sums": known.sums, "lengths": known.lengths}

    def to(self, like: Tensor) -> SampleSums:
        """Return these sums on the device of ``like``."""
        scale = self.scale.to(like.device) if isinstance(self.scale, Tensor) else self.scale
        return SampleSums(self.sums.to(like.device), self.lengths.to(like.device), scale)

    @classmethod
    def joined(cls, parts: Sequence[SampleSums], processes: Processes) -> SampleSums:
        """Return the sums over the joined batch of ``parts`` and of all processes."""
        if len(parts) == processes.count == 1:
            return parts[0]
        parts = [part.multiplied() for part in parts]
        sums, lengths = parts[0].sums, parts[0].lengths
        if len(parts) > 1:
            sums = torch.stack([part.sums for part in parts]).sum(0)
            lengths = root_sum_square(torch.stack([part.lengths for part in parts]))
        if processes.count > 1:
            told = processes.gather(torch.cat([sums, lengths[:, None]], dim=1))
            sums, lengths = told[..., :-1].sum(0), root_sum_square(told[..., -1])
        return cls(sums, lengths)

    def agreement(self) -> Tensor:
        r"""Return :math:`\lVert \sum_b A_{kb} \rVert^2 / \sum_b \lVert A_{kb} \rVert^2`, NaN if unknown. ``(K,)``.

        Its expectation is one if samples have nothing in common; it is the number of samples if all are equal. It is
        unknown if only one sample has a gradient, such as the only one with a label: then it is always one.
        """
        found = (self.sums / self.lengths[:, None]).square().sum(1)
        return found.masked_fill((found - 1).abs() < ROUNDING, torch.nan)


class Sketch:
    """Random projections of a representation, kept until the backward pass.

    The first dimension contains the samples; positions within a sample are added. Projections are drawn again after
    every update of the rotations, so that their errors are independent.

    Args:
        rep: z.
        dims: Its rotated dimensions.
        seed: Seed of the projections, equal in all processes.
    """

    def __init__(self, rep: Tensor, dims: RotatedDims, seed: int) -> None:
        self._dims = dims
        features = dims.view(rep.detach())
        features = features if features.dtype == torch.float64 else features.float()
        self._of_rep, self._of_grads = _drawn(features.shape[1], features, seed)
        self._num_samples = 1 if 0 in dims.resolve(rep.shape) else len(rep)
        with without_autocast(rep.device):
            self._projected = self._samples(_project(features, self._of_rep))

    def _samples(self, projected: Tensor) -> Tensor:
        """Return ``(..., L, P, 8)`` as ``(..., B, L P / B, 8)``."""
        lead = projected.shape[:-3]
        return projected.reshape(*lead, self._num_samples, -1, NUM_PROJECTIONS)

    def sums(self, grads: Tensor) -> SampleSums:
        """Return the sums for gradients at the representation, shape ``(K, *z.shape)``."""
        of_rep, has_one_position = self._projected, self._projected.shape[1] == 1
        with without_autocast(grads.device):
            projected = self._samples(_project(self._dims.view_stacked(grads), self._of_grads))
            each = (projected.mT * of_rep if has_one_position else projected.mT @ of_rep).flatten(2)  # (K, B, 64)
        return SampleSums(each.sum(1), torch.linalg.vector_norm(each, dim=(1, 2)))


def _project(features: Tensor, projections: Tensor) -> Tensor:
    """Return the projections, shape ``(d, 8)``, of ``features``, shape ``(..., d, P)``: shape ``(..., P, 8)``."""
    if features.shape[-1] == 1:
        return features.mT @ projections  # vectors: one product
    return (projections.mT @ features).mT  # maps: without a copy of them


def _drawn(size: int, like: Tensor, seed: int) -> Tensor:
    """Return projections of z and of its gradients. Shape ``(2, size, 8)``."""
    try:
        generator = torch.Generator(like.device)
    except RuntimeError:  # devices without random numbers
        generator = torch.Generator()
    shape = 2, size, NUM_PROJECTIONS
    return torch.randn(shape, device=generator.device, generator=generator.manual_seed(seed)).to(like)
