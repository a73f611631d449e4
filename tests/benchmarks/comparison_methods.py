"""The methods that are compared, each with the learning rates that it may choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rotoopt import GradNorm
from tests.benchmarks.problems import Problem, Trial
from tests.benchmarks.trainings import Training, WithModule, WithOptimizer, plain_sum, single_task

ALPHA = 0.5  # of GradNorm: between equal norms and equal rates of training
AGGREGATORS = ("UPGrad", "MGDA", "PCGrad", "AlignedMTL", "IMTLG")

# Six settings for every method: the rate of the network alone, or with that of the rotations or weights. As multiples
# of the middle.
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
FEWER_FACTORS = (1 / 2, 1.0, 2.0)
WEIGHT_LRS = (0.0025, 0.025)


@dataclass(frozen=True)
class Setting:
    """Learning rates: that of the network as a multiple of the problem's own, and that of rotations or weights."""

    factor: float
    own_lr: float | None = None


@dataclass(frozen=True)
class Method:
    """A way to train a trial.

    Attributes:
        name: What the tables say.
        make: Returns a training for a trial, the network's learning rate and that of the method, if it has one.
        own: What the learning rate of the method is for.
        official: Whether it runs in the environment of the official package.
    """

    name: str
    make: Callable[..., Training]
    own: str | None = None
    official: bool = False

    def settings(self, problem: Problem) -> list[Setting]:
        """Return the six settings to choose from."""
        if self.own is None:
            return [Setting(problem.middle_lr * factor) for factor in FACTORS]
        lrs = problem.rotation_lrs if self.own == "rotations" else WEIGHT_LRS
        return [Setting(problem.middle_lr * factor, lr) for factor in FEWER_FACTORS for lr in lrs]

    def training(self, trial: Trial, setting: Setting) -> Training:
        """Return a training of ``trial``."""
        lr = setting.factor * trial.lr
        return self.make(trial, lr) if setting.own_lr is None else self.make(trial, lr, setting.own_lr)


def _rotograd(init: str) -> Callable[..., Training]:
    return lambda trial, lr, own_lr: WithOptimizer(trial, lr, init=init, rotation_lr=own_lr)


def _gradnorm(trial: Trial, lr: float, own_lr: float) -> Training:
    return WithOptimizer(trial, lr, weighting=GradNorm(ALPHA, lr=own_lr), rotate=False)


def _aggregated(name: str) -> Callable[..., Training]:
    def make(trial: Trial, lr: float) -> Training:
        from torchjd import aggregation  # not in the environment of the official package

        return WithOptimizer(trial, lr, weighting=getattr(aggregation, name)(), rotate=False)

    return make


SINGLE_TASK = "one network per task"

METHODS = {
    method.name: method
    for method in (
        Method(SINGLE_TASK, single_task),
        Method("plain sum", plain_sum),
        Method("scale only", partial(WithOptimizer, rotate=False)),
        Method("RotoGrad, identity", _rotograd("identity"), "rotations"),
        Method("RotoGrad, haar", _rotograd("haar"), "rotations"),
        Method("RotateOnly", partial(WithModule, package="rotoopt", name="RotateOnly"), "rotations"),
        Method("GradNorm", _gradnorm, "weights"),
        Method("RotoGradNorm", partial(WithModule, package="rotoopt", name="RotoGradNorm", alpha=ALPHA), "rotations"),
        Method("rotograd 0.1.6", partial(WithModule, package="rotograd", name="RotoGrad"), "rotations", official=True),
        *(Method(f"TorchJD {name}", _aggregated(name)) for name in AGGREGATORS),
    )
}
