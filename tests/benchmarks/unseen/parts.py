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


def rank_error(scores: Tensor, labels: Tensor) -> float:
    """Return 1 - AUC: the share of pairs of a positive and a negative in the wrong order."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(len(scores), dtype=torch.float64)
    positives = ranks[labels > 0]
    num_negatives = len(scores) - len(positives)
    wins = (positives.sort().values - torch.arange(len(positives))).sum()  # negatives below each positive
    return 1 - (wins / max(len(positives) * num_negatives, 1)).item()


def error_rate(scores: Tensor, labels: Tensor) -> float:
    """Return the share of ``labels`` without the highest of ``scores (..., C)``; half a sample if there is none."""
    return max((scores.argmax(-1) != labels).float().mean().item(), 0.5 / labels.numel())
