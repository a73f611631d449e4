"""Small networks, ways to copy them, and a training loop, for regularizers with their own heads."""

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt import RotoGradOptimizer

INPUTS, FEATURES, NUM_SOURCE, NUM_TARGET = 4, 6, 5, 3


class Backbone(nn.Sequential):
    """A network with an attribute ``out_features``."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(INPUTS, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
        self.out_features = FEATURES


class Elsewhere(nn.Module):
    """Records the devices of its inputs, and returns source logits on the CPU, where numbers can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.devices.append(x.device.type)
        return torch.zeros(len(x), NUM_SOURCE)


def through_a_file(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_a_file,
}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def train(
    optimizer: RotoGradOptimizer, losses_of: Callable[[int], tuple[Mapping[str, Tensor], Tensor | None]], steps: int
) -> list[dict[str, float]]:
    """Return the losses of every step, by task.

    Args:
        optimizer: The optimizer.
        losses_of: Returns losses and representation of a batch.
        steps: Number of batches.
    """
    history = []
    for batch in range(steps):
        losses, rep = losses_of(batch)
        optimizer.zero_grad()
        optimizer.step(losses, rep)
        record = optimizer.last_step
        assert record is not None
        assert record.finite
        history.append({task: loss.item() for task, loss in losses.items()})
    return history
