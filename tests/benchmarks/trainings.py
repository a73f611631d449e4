"""Ways to train the network of a trial: wrapped optimizer, module API, one network per task."""

from __future__ import annotations

import copy
import importlib
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from rotoopt import RotoGradOptimizer
from rotoopt._rotation.step import RotationGradient
from tests.benchmarks.problems import Outputs, Trial


class Training(ABC):
    """The training of a network.

    Args:
        trial: The problem.
        optimizer: The optimizer of the network, without rotations.
    """

    def __init__(self, trial: Trial, optimizer: Optimizer) -> None:
        self.trial = trial
        self._scheduler = CosineAnnealingLR(optimizer, trial.num_steps) if trial.decays else None

    @abstractmethod
    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """Return what the heads make of a batch."""

    @abstractmethod
    def step(self, inputs: Tensor, targets: Any) -> None:
        """Train on one batch."""

    def run(self) -> list[float]:
        """Train, and average the metrics over the last fifth of training: single ones vary between epochs."""
        test_steps = {self.trial.num_steps * part // 25 for part in range(21, 26)}
        tests = []
        for step, (inputs, targets) in enumerate(self.trial.batches(), start=1):
            self.step(inputs, targets)
            if self._scheduler is not None:
                self._scheduler.step()
            if step in test_steps:
                tests.append(self.trial.test(self.outputs))
        return [statistics.fmean(values) for values in zip(*tests, strict=True)]


class WithOptimizer(Training):
    """A network trained by ``RotoGradOptimizer``, with any options."""

    def __init__(self, trial: Trial, lr: float, **options: Any) -> None:
        self.optimizer = RotoGradOptimizer(
            trial.optimizer([*trial.backbone.parameters(), *trial.heads.parameters()], lr),
            heads=trial.heads,
            dim=trial.dim,
            normalize_losses=trial.normalize_losses,
            **options,
        )
        super().__init__(trial, self.optimizer)

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """Return what the heads make of the rotated representation."""
        return self._forward(inputs)[0]

    def step(self, inputs: Tensor, targets: Any) -> None:
        """Train on one batch."""
        outputs, rep = self._forward(inputs)
        self.optimizer.zero_grad()
        self.optimizer.step(self.trial.losses(outputs, targets), rep)

    def _forward(self, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        rep = self.trial.backbone(inputs)
        return [head(rep) for head in self.trial.heads], rep


class RandomTurns(WithOptimizer):
    """A control: rotations with updates of the same size, but in fixed random directions."""

    def __init__(self, trial: Trial, lr: float, **options: Any) -> None:
        super().__init__(trial, lr, **options)
        step = self.optimizer._core.rotation_step
        turn = step.step
        step.step = lambda gradients, *rest: turn([_at_random(each) for each in gradients], *rest)  # type: ignore[method-assign]


def _at_random(gradient: RotationGradient) -> RotationGradient:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(gradient.directions.shape, generator=generator)
    norms = torch.linalg.vector_norm(directions, dim=(1, 2, 3), keepdim=True)
    target = torch.randn(gradient.target.shape, generator=generator)
    return replace(gradient, directions=directions / norms, target=target)


class FirstLayer(nn.Module):
    """A square layer, initially the identity: as many parameters as a rotation has entries.

    Args:
        size: Number of features.
        dim: Dimension of the features.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size))
        self.dim = dim

    def forward(self, rep: Tensor) -> Tensor:
        """Return the features times the weight."""
        return (rep.movedim(self.dim, -1) @ self.weight.mT).movedim(-1, self.dim)


def with_first_layers(trial: Trial, lr: float, **options: Any) -> WithOptimizer:
    """Return a control: heads that begin with a trained layer instead of a rotation."""
    trial.heads = nn.ModuleList(nn.Sequential(FirstLayer(trial.d, trial.dim), head) for head in trial.heads)
    return WithOptimizer(trial, lr, **{"rotate": False, **options})


class SumOfLosses(Training):
    """A network trained on the plain sum of its losses, or of a function of each, without this package."""

    def __init__(
        self,
        trial: Trial,
        network: nn.Module,
        outputs: Outputs,
        lr: float,
        changed: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> None:
        self._outputs = outputs
        self._changed = changed
        self.optimizer = trial.optimizer(network.parameters(), lr)
        super().__init__(trial, self.optimizer)

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """Return what the heads make of a batch."""
        return self._outputs(inputs)

    def step(self, inputs: Tensor, targets: Any) -> None:
        """Train on one batch."""
        losses = self.trial.losses(self.outputs(inputs), targets)
        losses = losses if self._changed is None else self._changed(losses)
        self.optimizer.zero_grad()
        torch.autograd.backward(losses)
        self.optimizer.step()


def plain_sum(trial: Trial, lr: float, changed: Callable[[list[Tensor]], list[Tensor]] | None = None) -> SumOfLosses:
    """Return the training of one network for all tasks."""

    def outputs(inputs: Tensor) -> list[Tensor]:
        rep = trial.backbone(inputs)
        return [head(rep) for head in trial.heads]

    return SumOfLosses(trial, nn.ModuleList([trial.backbone, trial.heads]), outputs, lr, changed)


def fixed_weights(trial: Trial, lr: float, draw: float) -> SumOfLosses:
    """Return a training with random log-normal weights of the losses."""
    weights = torch.randn(len(trial.heads), generator=torch.Generator().manual_seed(int(draw))).exp()
    return plain_sum(trial, lr, lambda losses: [w * loss for w, loss in zip(weights, losses, strict=True)])


def sum_of_logs(trial: Trial, lr: float) -> SumOfLosses:
    """Return a training on the sum of the logarithms of the losses."""
    return plain_sum(trial, lr, lambda losses: [loss.log() for loss in losses])


def single_task(trial: Trial, lr: float) -> SumOfLosses:
    """Return the training of one network per task, all from the same weights.

    They share no parameter, so the sum of their losses trains each as if it were alone.
    """
    networks = nn.ModuleList(nn.Sequential(copy.deepcopy(trial.backbone), head) for head in trial.heads)
    return SumOfLosses(trial, networks, lambda inputs: [network(inputs) for network in networks], lr)


class WithModule(Training):
    """A network inside of a module of the official API, of this or of the official package.

    Args:
        trial: The problem.
        lr: Learning rate of the network.
        rotation_lr: Learning rate of Adam on the rotations.
        package: ``"rotoopt.rotograd"`` or ``"rotograd"``.
        name: Name of the module.
        **options: Options of the module.
    """

    def __init__(self, trial: Trial, lr: float, rotation_lr: float, *, package: str, name: str, **options: Any) -> None:
        module = importlib.import_module(package)
        make, self._cached = getattr(module, name), module.cached
        heads = list(trial.heads)
        normalize = trial.normalize_losses
        self.model = make(
            trial.backbone, heads, trial.d, post_shape=trial.post_shape, normalize_losses=normalize, **options
        )
        network = [*trial.backbone.parameters(), *trial.heads.parameters()]
        self.optimizers = [
            trial.optimizer(network, lr),
            torch.optim.Adam(self.model.mtl_parameters(), lr=rotation_lr),
        ]
        super().__init__(trial, self.optimizers[0])

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """Return what the heads make of the rotated representation."""
        self.model.eval()
        outputs: list[Tensor] = self.model(inputs)
        self.model.train()
        return outputs

    def step(self, inputs: Tensor, targets: Any) -> None:
        """Train on one batch."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with self._cached():  # as the README of rotograd recommends
            self.model.backward(self.trial.losses(self.model(inputs), targets))
        for optimizer in self.optimizers:
            optimizer.step()
