"""What several of the unseen problems use: networks and a metric."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*sizes: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def head(*sizes: int) -> nn.Sequential:
    """Return linear layers with ReLU before each of them."""
    return nn.Sequential(nn.ReLU(), *mlp(*sizes))


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Return the mean over the positives of the precision at their rank."""
    hits = labels[scores.argsort(descending=True)].double()
    precisions = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return (precisions * hits).sum().item() / max(hits.sum().item(), 1)
