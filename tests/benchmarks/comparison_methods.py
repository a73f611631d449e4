"""The methods that are compared, and the learning rates to choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rotoopt import GradNorm, ProgressWeighting, RotoGradWeighting, Weighting
from rotoopt.weighting import Measurements
from tests.benchmarks.problems import Problem, Trial
from tests.benchmarks.trainings import (
    RandomTurns,
    Training,
    WithModule,
    WithOptimizer,
    fixed_weights,
    plain_sum,
    single_task,
    sum_of_logs,
    with_first_layers,
)

ALPHA = 0.5  # of GradNorm: between equal norms and equal rates of training
# With the hyperparameters of their papers. NashMTL also needs the number of tasks, and solves its problem in every 25th
# step, the fast variant of its paper, because solving it takes much longer than a step. It needs
# `pip install cvxpy ecos`.
AGGREGATORS: dict[str, dict[str, float]] = {
    "UPGrad": {},
    "MGDA": {},
    "PCGrad": {},
    "AlignedMTL": {},
    "IMTLG": {},
    "NashMTL": {"update_weights_every": 25},
    "FairGrad": {"alpha": 1.0},
    "ExcessMTL": {},
    "DualProj": {},
}

# Six settings for every method: learning rates of the network alone, or with those of the rotations or weights, as
# multiples of the middle.
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
FEWER_FACTORS = (1 / 2, 1.0, 2.0)
WEIGHT_LRS = (0.0025, 0.025)
WEIGHT_DRAWS = (0.0, 1.0)


@dataclass(frozen=True)
class Setting:
    """Learning rates: that of the network as a multiple of the problem's own, and that of rotations or weights."""

    factor: float
    own_lr: float | None = None


@dataclass(frozen=True)
class Method:
    """A way to train a trial.

    Attributes:
        name: Name in the tables.
        make: Returns a training for a trial, the network's learning rate and that of the method, if it has one.
        own: Meaning of the second number of a setting: the learning rate of ``"rotations"`` or ``"weights"``, or which
            ``"draw"`` of random weights.
        official: Whether it needs the environment of the official package.
        variant: The method of which it changes one part, to show its effect. Variants have no rank.
    """

    name: str
    make: Callable[..., Training]
    own: str | None = None
    official: bool = False
    variant: str | None = None

    def settings(self, problem: Problem) -> list[Setting]:
        """Return the six settings to choose from."""
        if self.own is None:
            return [Setting(problem.middle_lr * factor) for factor in FACTORS]
        lrs = {"rotations": problem.rotation_lrs, "weights": WEIGHT_LRS, "draw": WEIGHT_DRAWS}[self.own]
        return [Setting(problem.middle_lr * factor, lr) for factor in FEWER_FACTORS for lr in lrs]

    def training(self, trial: Trial, setting: Setting) -> Training:
        """Return a training of ``trial``."""
        lr = setting.factor * trial.lr
        return self.make(trial, lr) if setting.own_lr is None else self.make(trial, lr, setting.own_lr)


class WithoutSignal(ProgressWeighting):
    """The default with progress alone."""

    needs_agreement = False


class WithoutProgress(ProgressWeighting):
    """The default with the signal alone."""

    def __call__(self, measured: Measurements) -> Tensor:
        """Return the weights as if the losses were unknown."""
        return super().__call__(replace(measured, losses=None))


class FirstNorms(Weighting):
    """Divide every gradient by its initial norm."""

    lagged = True

    def __call__(self, measured: Measurements) -> Tensor:
        """Return one over the references."""
        return torch.where(measured.norm_references > 0, 1 / measured.norm_references, 1.0)


def _rotograd(init: str) -> Callable[..., Training]:
    return lambda trial, lr, own_lr: WithOptimizer(
        trial, lr, weighting=RotoGradWeighting(), init=init, rotation_lr=own_lr
    )


def _weighted(
    make: Callable[[], Weighting], training: Callable[..., Training] = WithOptimizer, **options: Any
) -> Callable[..., Training]:
    return lambda trial, lr: training(trial, lr, weighting=make(), **{"rotate": False, **options})


def _gradnorm(trial: Trial, lr: float, own_lr: float) -> Training:
    return WithOptimizer(trial, lr, weighting=GradNorm(ALPHA, lr=own_lr), rotate=False)


def _aggregated(name: str, told: dict[str, Any]) -> Callable[..., Training]:
    def make(trial: Trial, lr: float) -> Training:
        from torchjd import aggregation  # not in the environment of the official package

        options = {"n_tasks": len(trial.heads), **told} if name == "NashMTL" else told
        return WithOptimizer(trial, lr, weighting=getattr(aggregation, name)(**options), rotate=False)

    return make


SINGLE_TASK = "one network per task"
PLAIN_SUM = "plain sum"
DEFAULT = "default"

_ours = partial(WithModule, package="rotoopt.rotograd")

METHODS = {
    method.name: method
    for method in (
        Method(SINGLE_TASK, single_task),
        Method(PLAIN_SUM, plain_sum),
        Method("fixed weights", fixed_weights, "draw"),
        Method("sum of log losses", sum_of_logs),
        Method("first norms", _weighted(FirstNorms)),
        Method(DEFAULT, WithOptimizer),
        *(
            Method(f"{DEFAULT}, {name}", make, variant=DEFAULT)
            for name, make in {
                "rotate=False": _weighted(ProgressWeighting),
                "no signal": _weighted(WithoutSignal, rotate=True),
                "no progress": _weighted(WithoutProgress, rotate=True),
                "no memory": _weighted(partial(ProgressWeighting, decay=0.0), rotate=True),
                "alpha=1/2": _weighted(partial(ProgressWeighting, alpha=0.5), rotate=True),
                "alpha=1": _weighted(partial(ProgressWeighting, alpha=1.0), rotate=True),
                "random turns": _weighted(ProgressWeighting, RandomTurns, rotate=True),
                "fixed haar": _weighted(ProgressWeighting, rotate=True, init="haar", rotation_lr=0.0),
                "first layers": _weighted(ProgressWeighting, with_first_layers),
            }.items()
        ),
        Method("scale only", _weighted(RotoGradWeighting)),
        Method("RotoGrad, identity", _rotograd("identity"), "rotations"),
        Method("RotoGrad, haar", _rotograd("haar"), "rotations"),
        Method("RotateOnly", partial(_ours, name="RotateOnly"), "rotations"),
        Method("GradNorm", _gradnorm, "weights"),
        Method("RotoGradNorm", partial(_ours, name="RotoGradNorm", alpha=ALPHA), "rotations"),
        Method("rotograd 0.1.6", partial(WithModule, package="rotograd", name="RotoGrad"), "rotations", official=True),
        *(Method(f"TorchJD {name}", _aggregated(name, told)) for name, told in AGGREGATORS.items()),
    )
}
