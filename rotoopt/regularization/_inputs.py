"""Inputs of losses and classifiers: checks with their errors, and the precision to use."""

from __future__ import annotations

import torch
from torch import Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Raise unless two tensors, given by name, have the same shape ``(b, N)``."""
    (name, tensor), (other_name, other) = tensors.items()
    if tensor.ndim != 2 or tensor.shape != other.shape:
        raise ValueError(
            f"`{name}` and `{other_name}` must have the same shape (b, N), got {tuple(tensor.shape)} and "
            f"{tuple(other.shape)}."
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 if it has less precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_labels(labels: Tensor, batch_size: int, num_classes: int | None) -> None:
    """Raise unless ``labels`` are ``batch_size`` class numbers below ``num_classes`` (``None``: any).

    The values of labels on a GPU are not checked, since reading them would synchronize. Operations that use them must
    therefore not interpret negative ones as indices from the end.
    """
    if labels.shape != (batch_size,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` must be one class number per sample, of shape ({batch_size},), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[(labels < 0) | (labels >= num_classes)] if num_classes is not None else labels[labels < 0]
    if len(wrong):
        rule = "not be negative" if num_classes is None else f"be in 0..{num_classes - 1}"
        raise ValueError(f"`labels` must {rule}, got {sorted(set(wrong.tolist()))[:10]}.")
