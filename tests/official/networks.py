"""Networks, losses and the toy problem of the comparison with the official package, the same on both sides.

The environment of the official package has no rotoopt, so only torch is imported here.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["vectors", "tokens", "maps", "tuples"]
INPUT_SHAPES: dict[Kind, tuple[int, ...]] = {
    "vectors": (4, 3),
    "tokens": (4, 2, 3),
    "maps": (4, 1, 3, 4),  # their representation is (4, channels, 2, 3)
    "tuples": (4, 3),
}

TOY_OPTIMA = (1.5, -1.5)  # of the two tasks, in both coordinates
TOY_STEPS = 400
TOY_RECORD_EVERY = 20
TOY_LR = 1e-3  # SGD on the network
TOY_ROTATION_LR = 0.05  # Adam on the rotations
TOY_ROTATION_DECAY = 0.99999  # of that rate, after every step


class Network(nn.Module):
    """Contains the modules of the models, so that their parameters have names on both sides."""

    def __init__(self, backbone: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)


class ExtraOutputs(nn.Module):
    """Returns the output of ``module`` and two further tensors, which the losses do not use."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = self.module(x)
        return output, output.square(), x.sum(dim=-1)


def build(kind: Kind, size: int, num_tasks: int) -> Network:
    """Return a new network.

    Args:
        kind: What the backbone returns: ``"vectors"`` (B, size), ``"tokens"`` (B, T, size), ``"maps"``
            (B, size, 2, 3), or ``"tuples"``: vectors, with extra outputs of the backbone and of the first head.
        size: Features, or channels, of the representation.
        num_tasks: K; head k has k + 1 outputs.
    """
    backbone: nn.Module
    heads: list[nn.Module]
    if kind == "maps":
        backbone = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, size, 1))
        heads = [
            nn.Sequential(nn.Conv2d(size, 1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, k + 1)) for k in range(num_tasks)
        ]
    else:
        backbone = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, size))
        heads = [nn.Sequential(nn.Linear(size, 2), nn.Tanh(), nn.Linear(2, k + 1)) for k in range(num_tasks)]
    if kind == "tuples":
        backbone, heads = ExtraOutputs(backbone), [ExtraOutputs(heads[0]), *heads[1:]]
    return Network(backbone, heads)


def task_losses(predictions: Sequence[Tensor], targets: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """Return one mean squared error per task, times its scale: all are positive."""
    triples = zip(predictions, targets, scales, strict=True)
    return [scale * (prediction - target).square().mean() for prediction, target, scale in triples]


def backbone_loss(rep: Tensor) -> Tensor:
    """Return the loss of the backbone alone, for cases that have one."""
    return 0.3 * rep.square().mean()


def build_toy() -> Network:
    """Return the network of the official example: 2-10-2, and identity heads."""
    backbone = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2))
    return Network(backbone, [nn.Identity() for _ in TOY_OPTIMA])


def toy_inputs() -> Tensor:
    """Return the batch of the official example: 256 times the same point."""
    return torch.zeros(256, 2, dtype=torch.float64)


def toy_losses(predictions: Sequence[Tensor]) -> list[Tensor]:
    r"""Return :math:`\sum_i |u_i| - \sin(3 u_i) / u_i` per task, u the distance to its optimum, where it is -6.

    By ``sinc``: the official example's quotient is NaN exactly at the optimum.
    """
    distances = [prediction - optimum for prediction, optimum in zip(predictions, TOY_OPTIMA, strict=True)]
    return [(u.abs() - 3 * torch.sinc(3 * u / math.pi)).sum(dim=-1).mean() for u in distances]
