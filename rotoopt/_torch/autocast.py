"""Computing in the dtype of the inputs, although the caller may be under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def is_autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for operations on ``device``."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off for operations on ``device``."""
    if is_autocast_on(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # to enter autocast takes longer than a small operation
