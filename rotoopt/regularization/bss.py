"""Batch spectral shrinkage (BSS): a penalty on the smallest singular values of a batch of features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BatchSpectralShrinkage(nn.Module):
    r"""Penalty on the k smallest singular values of the features, whose directions do not transfer.

    .. math:: \Omega(F) = \sum_{i=1}^{k} \sigma_{-i}^2

    where :math:`\sigma_{-i}` is the i-th smallest singular value of the ``(b, d)`` matrix F. It is invariant to
    rotations of the features: computed from the representation z, as ``backbone_loss`` of
    :class:`~rotoopt.RotoGradOptimizer`, one term serves all heads. It is a property of the batch, not a mean over
    samples: with DistributedDataParallel, each process penalizes its own part.

    Args:
        k: Number of singular values, from 1 to min(b, d).

    Shape:
        - Input: ``(b, d)``, of any floating-point type.
        - Output: ``()``, at least float32.

    Raises:
        TypeError: If the features are not real floating-point numbers.
        ValueError: If ``k`` is out of range, or the features are not a matrix.

    Example:
        >>> BatchSpectralShrinkage(k=2)(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        tensor(5.)

    Source: Chen, Wang, Fu, Long and Wang, Catastrophic Forgetting Meets Negative Transfer, NeurIPS 2019. Differences
    from ``tllib.regularization.bss``: ``k`` out of range is an error, where tllib counts values twice or returns 0;
    half precision works; features with NaN give NaN instead of an error, so that a ``GradScaler`` can skip the step;
    the singular vectors are computed from a Gram matrix in float64 instead of a decomposition of F in its own
    precision, which is faster, and more accurate if F is in float32. If F is in float64,
    :math:`\sigma_{\max} / \sigma_{-k}` should be below 1e7. The vectors are constants in the backward pass: first
    derivatives are correct, second derivatives are not.
    """

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"`k` must be a positive number of singular values, got {k!r}.")
        self.k = k

    def forward(self, feature: Tensor) -> Tensor:
        """Return the penalty."""
        if not feature.is_floating_point():
            raise TypeError(f"`feature` must be a real floating-point tensor, got {feature.dtype}.")
        if feature.ndim != 2:
            raise ValueError(
                f"`feature` must have shape (b, d), got {tuple(feature.shape)}. Pool or flatten it: samples in rows."
            )
        if min(feature.shape) < self.k:
            raise ValueError(
                f"`feature` must have at least k={self.k} singular values, got {min(feature.shape)} for shape "
                f"{tuple(feature.shape)}. Is the last batch smaller? Pass drop_last=True to the loader."
            )
        # The shorter side first: (m, n), m <= n. MPS has no float64.
        exact = feature.to("cpu" if feature.device.type == "mps" else feature.device, torch.float64)
        exact = exact if len(exact) <= exact.shape[1] else exact.mT
        projected = _smallest_left_vectors(exact.detach(), self.k).mT @ exact  # (k, n), rows of norm sigma
        return projected.square().sum().to(feature.device, torch.promote_types(feature.dtype, torch.float32))

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"k={self.k}"


def _smallest_left_vectors(matrix: Tensor, k: int) -> Tensor:
    """Return the left singular vectors of the k smallest singular values. Shape ``(m, k)``.

    Synchronizes with the device, as all decompositions of torch do.
    """
    gram = matrix @ matrix.mT
    finite = torch.where(gram.isfinite(), gram, 0.0)  # eigh raises an error for NaN
    vectors: Tensor = torch.linalg.eigh(finite).eigenvectors
    return vectors[:, :k]
