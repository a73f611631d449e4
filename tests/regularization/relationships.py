"""Source models, data, and the relationship computed with float64 means."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.regularization.networks import (
    INPUTS,
    NUM_SOURCE,
    NUM_TARGET,
)

Batches = list[tuple[Tensor, Tensor]]


def source_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Dropout(0.5), nn.Linear(8, NUM_SOURCE))


def data(seed: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    """Return samples with at least one of each class."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, INPUTS, generator=generator)
    rest = torch.randint(NUM_TARGET, (size - NUM_TARGET,), generator=generator)
    return x, torch.cat([torch.arange(NUM_TARGET), rest])


def oracle(batches: Batches, model: nn.Module) -> Tensor:
    """Mean source probabilities of the samples of each class, one sample after the other, in float64."""
    rows: dict[int, list[Tensor]] = {}
    for x, labels in batches:
        for sample, label in zip(x, labels.tolist(), strict=True):
            probabilities = model.eval()(sample[None])[0].detach().double().softmax(dim=0)
            rows.setdefault(label, []).append(probabilities)
    return torch.stack([torch.stack(rows[label]).mean(dim=0) for label in sorted(rows)])


def split(x: Tensor, labels: Tensor, *sizes: int) -> Batches:
    return list(zip(torch.split(x, list(sizes)), torch.split(labels, list(sizes)), strict=True))


X = torch.zeros(3, INPUTS)
