"""Tensor subclasses and tensors with attributes, such as those of MONAI, fastai and torchvision."""

from __future__ import annotations

import torch
from torch import Tensor


def plain(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as a ``torch.Tensor``, so that measurements of it are plain tensors, too.

    Tensors that wrap other tensors, such as a ``DTensor``, are not changed.
    """
    return tensor if type(tensor) is Tensor or hasattr(tensor, "__tensor_flatten__") else tensor.as_subclass(Tensor)


def with_attributes_of(source: Tensor, tensor: Tensor) -> Tensor:
    """Return ``tensor`` with the Python attributes of ``source``; torch.compile does not support them."""
    if tensor is not source and not torch.compiler.is_compiling():
        for name, value in vars(source).items():
            vars(tensor).setdefault(name, value)
    return tensor
