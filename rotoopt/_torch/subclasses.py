"""Tensors of classes of their own, and tensors with attributes: as those of MONAI, fastai and torchvision."""

from __future__ import annotations

import torch
from torch import Tensor


def plain(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as a ``torch.Tensor``, so that what is measured of it is one, too.

    What is made of other tensors, as a ``DTensor``, stays what it is.
    """
    return tensor if type(tensor) is Tensor or hasattr(tensor, "__tensor_flatten__") else tensor.as_subclass(Tensor)


def with_attributes_of(source: Tensor, tensor: Tensor) -> Tensor:
    """Return ``tensor`` with the attributes that Python code has given to ``source``; torch.compile sees none."""
    if tensor is not source and not torch.compiler.is_compiling():
        for name, value in vars(source).items():
            vars(tensor).setdefault(name, value)
    return tensor
