"""Moving a trained parameter to another device, optimizer state included."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer


def move_(param: nn.Parameter, optimizer: Optimizer, device: torch.device) -> None:
    """Move ``param`` and its state in ``optimizer``; it remains the same object.

    Args:
        param: A parameter that is in no graph.
        optimizer: The optimizer that trains only it.
        device: The new device.
    """
    torch.utils.swap_tensors(param, nn.Parameter(param.detach().to(device)))  # type: ignore[no-untyped-call]
    optimizer.load_state_dict(optimizer.state_dict())  # torch loads state to the device of the parameter
