"""Optimizers without training, whose records the histories of these tests contain."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from rotoopt import RotoGradOptimizer, StepRecord
from rotoopt.diagnostics import History


class FakeOptimizer:
    """Has the attributes of an optimizer that a history reads.

    Args:
        names: Names of the tasks.
        lr: Learning rate of the network.
    """

    def __init__(self, names: Sequence[str], lr: float = 1e-2) -> None:
        self.task_names = tuple(names)
        self.param_groups = [{"lr": lr / 2}, {"lr": lr}, {"params": []}]
        self._core = SimpleNamespace(built_in_step=False)
        self.last_step: StepRecord | None = None

    def step(self, **fields: Any) -> RotoGradOptimizer:
        """Make another record with these ``fields``; the others are determined by the number of tasks."""
        K = len(self.task_names)
        before = self.last_step
        angles = fields.get("angles", torch.zeros(K))
        record: dict[str, Any] = {
            "step": 0 if before is None else before.step + 1,
            "losses": torch.ones(K),
            "grad_norms": torch.ones(K),
            "weights": torch.ones(K),
            "cosines": torch.eye(K),
            "present": torch.ones(K, dtype=torch.bool),
            "finite": torch.tensor(True),
            "angles": angles,
            "lagged": False,
            "total_angles": angles if before is None else before.total_angles + angles,
            "rotation_lr": 1e-3,
            "rotations": None,
        }
        self.last_step = StepRecord(**{**record, **fields})
        return cast(RotoGradOptimizer, self)


def random_history(
    K: int, T: int, *, absent: float = 0.0, names: Sequence[str] | None = None, seed: int = 0, **fields: Any
) -> History:
    """Return T records of K tasks whose losses and norms decrease over decades, with conflicting gradients.

    Args:
        K: Number of tasks.
        T: Number of records.
        absent: Share of the records in which a task is absent.
        names: Names of the tasks.
        seed: Seed of the noise.
        **fields: Fields with the same value in all records.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = FakeOptimizer(names or [f"task {task}" for task in range(K)])
    history, scales = History(), torch.logspace(-2, 2, K)
    for step in range(T):
        present = torch.rand(K, generator=generator) >= absent
        directions = torch.nn.functional.normalize(torch.randn(K, 8, generator=generator), dim=1) * present[:, None]
        decay = 0.05 + torch.exp(torch.tensor(-3.0 * step / T))
        noise: Tensor = torch.exp(0.3 * torch.randn(K, generator=generator))
        values: dict[str, Any] = {
            "losses": torch.where(present, scales * decay * noise, torch.nan),
            "grad_norms": scales * noise * present,
            "cosines": directions @ directions.mT,
            "present": present,
            "angles": torch.rand(K, generator=generator) * 1e-3,
        }
        history.record(optimizer.step(**{**values, **fields}))
    return history
