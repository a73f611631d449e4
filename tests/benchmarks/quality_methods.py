"""The methods that the quality study compares: options of ``RotoGradOptimizer``, and how often rotations turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torchjd import aggregation

from rotoopt import EqualWeighting, RotoGradWeighting
from tests.benchmarks.problems import Trial
from tests.benchmarks.trainings import WithOptimizer

REFERENCE = "scale only"  # what all others are compared with


@dataclass(frozen=True)
class Method:
    """How a trial is trained.

    Attributes:
        name: What the tables say.
        options: Makes the keyword arguments, anew for every run: weightings may have state. The paper's weighting if
            they name none.
    """

    name: str
    options: Callable[[], dict[str, Any]]

    def training(self, trial: Trial) -> WithOptimizer:
        """Return the training of ``trial``."""
        return WithOptimizer(trial, trial.lr, **{"weighting": RotoGradWeighting(), **self.options()})


def rotograd(init: str, lr: float) -> Method:
    """Return RotoGrad with its own rotation step."""
    name = f"{init} lr={lr:.0e}".replace("e-0", "e-")
    return Method(name, partial(dict, init=init, rotation_lr=lr))


def rotations_only(init: str, lr: float) -> Method:
    """Return RotoGrad without its scaling of the gradients."""
    name = f"rotations only, {init} lr={lr:.0e}".replace("e-0", "e-")
    return Method(name, lambda: {"init": init, "rotation_lr": lr, "weighting": EqualWeighting()})


def aggregated(name: str) -> Method:
    """Return an aggregator of TorchJD at the representation, without rotations."""
    return Method(f"TorchJD {name}", lambda: {"weighting": getattr(aggregation, name)(), "rotate": False})


def official(lr: float) -> Method:
    """Return the recipe of the official package: Haar start, Adam on the rotations."""
    adam = partial(torch.optim.Adam, lr=lr)
    return Method(f"haar, Adam lr={lr:.0e}".replace("e-0", "e-"), lambda: {"init": "haar", "rotation_optimizer": adam})


PLAIN_SUM = Method("plain sum", lambda: {"weighting": EqualWeighting(), "rotate": False})
SCALE_ONLY = Method(REFERENCE, lambda: {"rotate": False})
FIXED_HAAR = Method("fixed haar", lambda: {"init": "haar", "rotation_lr": 0.0})

LRS = (5e-4, 1e-3, 3e-3, 1e-2)
BASELINES = [SCALE_ONLY, PLAIN_SUM, FIXED_HAAR]
OTHERS = [aggregated(name) for name in ("IMTLG", "AlignedMTL", "PCGrad")]

# By the name in `Problem.methods`.
METHOD_SETS: dict[str, list[Method]] = {
    "all": [
        *BASELINES,
        *(rotograd("identity", lr) for lr in LRS),
        *(rotograd("haar", lr) for lr in (1e-3, 3e-3)),
        rotations_only("identity", 1e-3),
        official(1e-3),
        *OTHERS,
    ],
    "few": [*BASELINES, *(rotograd("identity", lr) for lr in (5e-4, 1e-3, 3e-3)), rotograd("haar", 1e-3)],
    # One angle, and one point without noise: what moves by 1e-3 here has not moved.
    "toy": [
        *BASELINES,
        *(rotograd(init, lr) for init in ("identity", "haar") for lr in (5e-4, 1e-3, 1e-2, 1e-1)),
        rotations_only("identity", 1e-2),
        official(5e-2),
        *OTHERS,
    ],
}
