"""The methods, and one training on an unseen problem."""

from __future__ import annotations

from typing import Any

import torch
from torchjd.aggregation import UPGrad

from rotoopt import ProgressWeighting, RotoGradOptimizer
from tests.benchmarks.unseen import PROBLEMS

PLAIN_SUM, UPGRAD = "plain sum", "TorchJD UPGrad"
METHODS: dict[str, dict[str, Any]] = {
    PLAIN_SUM: {"plain": True},
    "default": {},
    "default, rotate=False": {"rotate": False},
    "default, alpha=1/2": {"weighting": ProgressWeighting(alpha=0.5)},
    "default, alpha=1": {"weighting": ProgressWeighting(alpha=1.0)},
    UPGRAD: {"weighting": UPGrad(), "rotate": False},
}


def methods(name: str) -> dict[str, dict[str, Any]]:
    """Return the methods that can be used on a problem."""
    return {key: of for key, of in METHODS.items() if key != UPGRAD or PROBLEMS[name].one_representation}


def train(name: str, seed: int, *, plain: bool = False, **options: Any) -> dict[str, float]:
    """Return the errors after training with the plain sum, or with ``RotoGradOptimizer(..., **options)``."""
    torch.set_num_threads(1)
    problem = PROBLEMS[name](seed)
    torch.manual_seed(seed + 77)
    bare = problem.optimizer()
    wrapped = None if plain else RotoGradOptimizer(bare, problem.heads_by_task, dim=problem.dim, **options)
    scheduler = problem.scheduler(bare if wrapped is None else wrapped)
    problem.model.train()
    for _ in range(problem.num_steps):
        losses = problem.losses()
        bare.zero_grad()
        if wrapped is None:
            torch.autograd.backward([loss for loss in losses.values() if loss is not None])
            bare.step()
        else:
            wrapped.step(losses)
        if scheduler is not None:
            scheduler.step()
    problem.model.eval()
    with torch.no_grad():
        return problem.errors()
