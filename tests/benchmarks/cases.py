"""What overhead.py measures: networks with several heads, and the ways to train them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchjd.aggregation import Aggregator, AlignedMTL, UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward

from rotoopt import RotoGradOptimizer

PLAIN, FLOOR, TORCHJD = "plain", "frozen dense", "torchjd"
ROTOOPT, SCALE_ONLY, NO_UPDATES = "rotoopt", "rotoopt, rotate=False", "rotoopt, no updates"
OURS = (PLAIN, FLOOR, SCALE_ONLY, NO_UPDATES, ROTOOPT)
ALL = (*OURS, TORCHJD)
OUTPUTS = 10  # of every head


@dataclass(frozen=True)
class Case:
    """A network on one batch.

    Attributes:
        description: Title of the table.
        input_shape: Shape of the batch.
        num_tasks: K.
        backbone: Makes the backbone.
        head: Makes a head.
        dense: Makes the d x d layer; frozen, in front of every head, it is the lower bound of the cost of a rotation.
        variants: Keys of ``VARIANTS`` to measure.
        dim: The rotated dimension of the representation.
    """

    description: str
    input_shape: tuple[int, ...]
    num_tasks: int
    backbone: Callable[[], nn.Module]
    head: Callable[[], nn.Module]
    dense: Callable[[], nn.Module]
    variants: tuple[str, ...] = ALL
    dim: int = -1


class Training:
    """The network of one case on one random batch, trained by Adam; with ``autocast``, forward in bfloat16."""

    def __init__(self, case: Case, variant: str, device: torch.device, *, autocast: bool = False) -> None:
        torch.manual_seed(0)  # the same network and batch for every variant
        self.case = case
        self.autocast = autocast
        with device:
            self.backbone = case.backbone()
            self.heads: list[nn.Module] = [case.head() for _ in range(case.num_tasks)]
            self.batch = torch.randn(case.input_shape)
            with torch.no_grad():
                rep = self.backbone(self.batch)
                self.targets = [torch.randn_like(head(rep)) for head in self.heads]
        params = [param for module in (self.backbone, *self.heads) for param in module.parameters()]
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(params, lr=1e-4)
        self.update = VARIANTS[variant](self)

    def forward(self) -> tuple[list[Tensor], Tensor]:
        """Return the losses and the representation."""
        with torch.autocast(self.batch.device.type, torch.bfloat16, enabled=self.autocast):
            rep = self.backbone(self.batch)
            losses = [
                nn.functional.mse_loss(head(rep), target) for head, target in zip(self.heads, self.targets, strict=True)
            ]
        return losses, rep

    def step(self) -> None:
        """Make one training step."""
        losses, rep = self.forward()
        self.optimizer.zero_grad()
        self.update(losses, rep)


Update = Callable[[list[Tensor], Tensor], None]  # from the losses and the representation to new parameters


def plain(training: Training) -> Update:
    """``sum(losses).backward(); optimizer.step()``."""

    def update(losses: list[Tensor], rep: Tensor) -> None:
        sum(losses[1:], start=losses[0]).backward()  # type: ignore[no-untyped-call]
        training.optimizer.step()

    return update


def frozen_dense(training: Training) -> Update:
    """The plain step with a fixed d x d layer in front of every head."""
    for task, head in enumerate(training.heads):
        dense = training.case.dense().to(training.batch.device).requires_grad_(False)
        training.heads[task] = nn.Sequential(dense, head)
    return plain(training)


def rotoopt(training: Training, **options: Any) -> Update:
    """The wrapped optimizer with its defaults, but for ``options``."""
    optimizer = RotoGradOptimizer(training.optimizer, training.heads, dim=training.case.dim, **options)
    training.optimizer = optimizer
    return optimizer.step


def torchjd(training: Training) -> Update:
    """TorchJD's ``mtl_backward``: the Jacobian with respect to the shared parameters, then an aggregator."""
    shared = list(training.backbone.parameters())
    aggregator = torchjd_aggregator()

    def update(losses: list[Tensor], rep: Tensor) -> None:
        mtl_backward(losses, features=rep)
        jac_to_grad(shared, aggregator)
        training.optimizer.step()

    return update


def torchjd_aggregator() -> Aggregator:
    """Return UPGrad if its solver (an extra of torchjd) is installed, else Aligned-MTL: the Jacobian dominates."""
    return UPGrad() if find_spec("qpsolvers") and find_spec("quadprog") else AlignedMTL()


VARIANTS: dict[str, Callable[[Training], Update]] = {
    PLAIN: plain,
    FLOOR: frozen_dense,
    SCALE_ONLY: partial(rotoopt, rotate=False),
    NO_UPDATES: partial(rotoopt, turn_every=sys.maxsize),  # one, in the first step
    ROTOOPT: rotoopt,
    TORCHJD: torchjd,
}


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.relu(self.body(images) + self.shortcut(images))


def resnet18() -> nn.Sequential:
    """ResNet-18 of torchvision without its last layer: images to 512 features."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, padding=1))
    for width_in, width in [(64, 64), (64, 128), (128, 256), (256, 512)]:
        layers += [ResidualBlock(width_in, width, width // width_in), ResidualBlock(width, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp(*widths: int) -> nn.Sequential:
    """Return linear layers with a ReLU behind each."""
    return nn.Sequential(*[layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())])


def conv(width_in: int, width: int, size: int) -> nn.Conv2d:
    """Return a convolution that keeps the size of a map."""
    return nn.Conv2d(width_in, width, size, padding="same", bias=size > 1)


def vectors(
    name: str, shape: tuple[int, ...], num_tasks: int, backbone: Callable[[], nn.Module], d: int, *variants: str
) -> Case:
    """Return a case with vectors of d features as its representation, and linear heads."""
    title = f"{name}, B = {shape[0]}, K = {num_tasks}, d = {d}, linear heads"
    head, dense = partial(nn.Linear, d, OUTPUTS), partial(nn.Linear, d, d, bias=False)
    return Case(title, shape, num_tasks, backbone, head, dense, variants or ALL)


def activated(case: Case) -> Case:
    """Return ``case`` with heads that begin with a ReLU, so that R is applied to z instead of their weights."""
    return replace(
        case,
        description=f"{case.description}, behind a ReLU",
        head=lambda: nn.Sequential(nn.ReLU(), case.head()),
        variants=OURS,
    )


RESNET18 = vectors("ResNet-18 on 64 x 64 images", (64, 3, 64, 64), 5, resnet18, 512)
STRESS = vectors("MLP 128-1024-1024", (128, 128), 5, partial(mlp, 128, 1024, 1024), 1024)
GROWTH = {d: vectors(f"MLP 128-{d}", (64, 128), 4, partial(mlp, 128, d), d, *OURS) for d in (512, 1024, 2048)}
MANY = vectors("MLP 128-1024-512", (256, 128), 40, partial(mlp, 128, 1024, 512), 512)
MAPS = Case(
    "two 3 x 3 convolutions, representation (B, C, H, W) = (16, 64, 32, 32), K = 3, dim=1, 3 x 3 convolutions as heads",
    (16, 3, 32, 32),
    3,
    lambda: nn.Sequential(conv(3, 64, 3), nn.ReLU(), conv(64, 64, 3), nn.ReLU()),
    partial(conv, 64, OUTPUTS, 3),
    partial(conv, 64, 64, 1),
    dim=1,
)
TOKENS = Case(
    "transformer encoder of 2 layers, representation (B, T, d) = (16, 64, 256), K = 4, linear heads on every token",
    (16, 64, 128),
    4,
    lambda: nn.Sequential(
        nn.Linear(128, 256),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True), 2),
    ),
    partial(nn.Linear, 256, OUTPUTS),
    partial(nn.Linear, 256, 256, bias=False),
)
NAMED = {
    "ResNet-18, d = 512": RESNET18,
    "MLP, d = 1024": STRESS,
    **{f"growth, d = {d}": case for d, case in GROWTH.items()},
    "K = 40, d = 512": MANY,
    "maps, d = 64": MAPS,
    "tokens, d = 256": TOKENS,
    "ReLU heads, d = 1024": activated(STRESS),
    "ReLU heads, d = 512": activated(GROWTH[512]),
    "ReLU heads, maps": activated(MAPS),
    "ReLU heads, tokens": activated(TOKENS),
}
