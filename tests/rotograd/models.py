"""Models of the official API for tests, and their training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from rotoopt.rotograd import RotateOnly, RotoGrad, RotoGradNorm, VanillaMTL

D, K = 6, 3
Model = RotateOnly | RotoGrad | RotoGradNorm
MODELS: dict[str, Callable[..., Model]] = {
    "RotateOnly": RotateOnly,
    "RotoGrad": RotoGrad,
    "RotoGradNorm": partial(RotoGradNorm, alpha=1.5),
}
BURN_IN = 3


def network() -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, D), nn.Tanh())
    return backbone, [nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(K)]


def any_model(name: str) -> VanillaMTL:
    return VanillaMTL(*network()) if name == "VanillaMTL" else make(name)


def make(name: str, **options: Any) -> Model:
    backbone, heads = network()
    torch.manual_seed(1)
    return MODELS[name](backbone, heads, D, burn_in_period=BURN_IN, **options)


def optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Return the two optimizers of the official README."""
    return [Adam(model.model_parameters(), lr=0.01), Adam(model.parameters(), lr=0.05)]


def losses_of(model: nn.Module, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    dtype = next(iter(model.backbone.parameters())).dtype  # type: ignore[union-attr]
    predictions = model(torch.randn(4, 5, generator=generator).to(dtype))
    return [(prediction - 1).square().mean() * 10.0**-task for task, prediction in enumerate(predictions)]


def train(model: Model, steppers: list[torch.optim.Optimizer], *batches: int) -> None:
    for batch in batches:
        losses = losses_of(model, batch)
        for each in steppers:
            each.zero_grad()
        model.backward(losses)
        for each in steppers:
            each.step()
