"""Classifiers with a source head and a target head, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt.regularization import co_tuning, lwf
from tests.regularization.networks import FEATURES, INPUTS, NUM_SOURCE, NUM_TARGET, Backbone

Make = Callable[..., lwf.Classifier]
CLASSIFIERS: dict[str, Make] = {"LWF": lwf.Classifier, "Co-Tuning": co_tuning.Classifier}


def make(name: str = "LWF", *, bottleneck: bool = False, seed: int = 0) -> lwf.Classifier:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"bottleneck": nn.Linear(FEATURES, 4), "bottleneck_dim": 4} if bottleneck else {}
    return CLASSIFIERS[name](Backbone(), NUM_TARGET, nn.Linear(FEATURES, NUM_SOURCE), **options)


def inputs(batch: int = 0, size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(size, INPUTS, generator=generator)
    return x, x[:, :NUM_TARGET].argmax(dim=1)
