"""Unseen problems on vectors: rare labels, twenty regressions, losses of all scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.unseen.base import Heads, Losses, Problem
from tests.benchmarks.unseen.parts import average_precision, head, mlp


class Imbalance(Problem):
    """Six binary labels of one input, of which 50 % to 1 % are positive; a random network per label draws them."""

    about = "six binary labels, 50 % to 1 % positives"
    rates = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
    metrics = tuple(f"{rate:.0%}" for rate in rates)
    lr = 3e-3
    num_steps = 700
    num_training = 4000

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.inputs = self.randn(self.num_training + 8000, 20)
        shared = torch.tanh(self.inputs @ self.randn(20, 12) / 4)
        self.labels = torch.stack([self._labels(shared, rate) for rate in self.rates], dim=1)
        self.backbone = mlp(20, 64, 64, 32)
        self.heads = nn.ModuleDict({name: head(32, 1) for name in self.metrics})
        self.model = nn.ModuleList([self.backbone, self.heads])

    def _labels(self, shared: Tensor, rate: float) -> Tensor:
        scores = torch.tanh(shared @ self.randn(12, 8)) @ self.randn(8) + 0.3 * self.randn(len(shared))
        return (scores > scores.quantile(1 - rate)).float()

    def _logits(self, inputs: Tensor) -> dict[str, Tensor]:
        z = self.backbone(inputs)
        return {name: each(z)[:, 0] for name, each in self.heads.items()}

    def losses(self) -> Losses:
        """Return the binary cross entropies."""
        rows = self.randint(self.num_training, 64)
        logits = self._logits(self.inputs[rows]).items()
        return {
            name: F.binary_cross_entropy_with_logits(of, labels)
            for (name, of), labels in zip(logits, self.labels[rows].T, strict=True)
        }

    def errors(self) -> dict[str, float]:
        """Return one minus the average precision."""
        logits = self._logits(self.inputs[self.num_training :]).items()
        held_out = self.labels[self.num_training :].T
        return {name: 1 - average_precision(of, labels) for (name, of), labels in zip(logits, held_out, strict=True)}


class Many(Problem):
    """Twenty regressions: 7 with a common structure, 7 linear ones, 3 of high frequency and 3 that are mostly noise."""

    about = "twenty regressions, shared, linear, hard or noisy"
    metrics = ("shared", "easy", "hard", "noisy")
    lr = 2e-2
    num_steps = 200
    counts = (7, 7, 3, 3)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.mixing, self.readout = self.randn(16, 10) / 4, self.randn(7, 10)
        self.linear = self.randn(7, 16) / 4
        self.directions = self.randn(6, 16) / 4
        self.randn(3)  # not used; the draws behind it depend on it
        self.test_inputs = self.randn(4000, 16)
        self.test_targets = self._targets(self.test_inputs, noise=0.0)
        groups = zip(self.metrics, self.counts, strict=True)
        self.backbone = mlp(16, 96, 96, 48)
        self.heads = nn.ModuleDict({f"{group}{k}": head(48, 1) for group, count in groups for k in range(count)})
        self.model = nn.ModuleList([self.backbone, self.heads])

    def _targets(self, inputs: Tensor, noise: float) -> Tensor:
        shared = torch.sin(2 * inputs @ self.mixing) @ self.readout.T / 3
        hard = torch.sin(3 * inputs @ self.directions.T)
        errors = self.randn(len(inputs), 6) * noise
        errors[:, :3] = 0
        return torch.cat([shared, inputs @ self.linear.T, hard + 2 * errors], dim=1)

    def _squared_errors(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        z = self.backbone(inputs)
        heads = zip(self.heads.items(), targets.T, strict=True)
        return {name: F.mse_loss(each(z)[:, 0], target) for (name, each), target in heads}

    def losses(self) -> Losses:
        """Return the squared errors on 2048 new inputs."""
        inputs = self.randn(2048, 16)
        return self._squared_errors(inputs, self._targets(inputs, noise=1.0))

    def errors(self) -> dict[str, float]:
        """Return the mean share of the variance that is not explained, for each group of tasks."""
        squared = self._squared_errors(self.test_inputs, self.test_targets)
        variances = self.test_targets.T
        shares = {
            name: (of / target.var()).item() for (name, of), target in zip(squared.items(), variances, strict=True)
        }
        groups = {group: [of for name, of in shares.items() if name.startswith(group)] for group in self.metrics}
        return {group: sum(of) / len(of) for group, of in groups.items()}


Sample = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Scales(Problem):
    """Five losses of very different kind and size, one of them negative and one that becomes exactly zero.

    A Gaussian negative log-likelihood; a squared error, summed, times 1e6; a hinge loss; a cross entropy times 1e-3;
    the negative evidence lower bound of a variational autoencoder.
    """

    about = "losses of five kinds, from 1e-3 to 1e6"
    metrics = ("nll RMSE", "mse", "hinge", "ce", "elbo recon")
    lr = 3e-3
    num_steps = 600

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.mixing = self.randn(12, 8) / 3.5
        self.readouts = [self.randn(8, outputs) for outputs in (1, 3, 1, 5)]
        self.backbone = mlp(12, 64, 32)
        self.mean, self.log_variance, self.decoder = nn.Linear(32, 4), nn.Linear(32, 4), mlp(4, 32, 12)
        sizes = {"nll": 2, "mse": 3, "hinge": 1, "ce": 5}
        self.heads = nn.ModuleDict({name: head(32, size) for name, size in sizes.items()})
        self.model = nn.ModuleList([self.backbone, self.mean, self.log_variance, self.decoder, self.heads])
        training, self.generator = self.generator, torch.Generator().manual_seed(13)
        self.test = self._sample(2000)
        self.generator = training

    @property
    def heads_by_task(self) -> Heads:
        """The encoder's two layers are the head of the last task."""
        return {**dict(self.heads.items()), "elbo": (self.mean, self.log_variance)}

    def _sample(self, count: int) -> Sample:
        factors = self.randn(count, 8)
        inputs = factors @ self.mixing.T + 0.05 * self.randn(count, 12)
        features = torch.tanh(factors)
        number = (features @ self.readouts[0])[:, 0] / 2 + 0.02 * self.randn(count)
        vector = torch.sin(features @ self.readouts[1])
        score = factors[:, 0] + 0.3 * factors[:, 1]
        side = torch.where(score.abs() > 0.3, torch.sign(score), 0.0)
        return inputs, number, vector, side, (features @ self.readouts[3] * 2).argmax(1)

    def _elbo(self, z: Tensor, inputs: Tensor) -> Tensor:
        mean: Tensor = self.mean(z)
        log_variance: Tensor = self.log_variance(z).clamp(-10, 10)
        noise: Tensor | int = self.randn(*mean.shape) if torch.is_grad_enabled() else 0
        decoded = self.decoder(mean + (0.5 * log_variance).exp() * noise)
        errors = F.gaussian_nll_loss(decoded, inputs, torch.full_like(inputs, 0.02), reduction="none").sum(1)
        divergence = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).sum(1)
        return (errors + divergence).mean()

    def _losses(self, z: Tensor, sample: Sample) -> dict[str, Tensor]:
        inputs, number, vector, side, label = sample
        mean, log_variance = self.heads["nll"](z).unbind(1)
        elbo = self._elbo(z, inputs)
        return {
            "nll": 0.5 * ((number - mean).pow(2) * (-log_variance).exp() + log_variance).mean(),
            "mse": 1e6 * F.mse_loss(self.heads["mse"](z), vector, reduction="sum"),
            "hinge": (F.relu(1 - side * self.heads["hinge"](z)[:, 0]) * (side != 0)).mean(),
            "ce": 1e-3 * F.cross_entropy(self.heads["ce"](z), label),
            "elbo": elbo,
        }

    def losses(self) -> Losses:
        """Return the five losses of 64 new samples."""
        sample = self._sample(64)
        return self._losses(self.backbone(sample[0]), sample)

    def errors(self) -> dict[str, float]:
        """Return the error of every task in its usual units."""
        inputs, number, vector, _, _ = self.test
        z = self.backbone(inputs)
        losses = self._losses(z, self.test)
        return {
            "nll RMSE": F.mse_loss(self.heads["nll"](z)[:, 0], number).sqrt().item(),
            "mse": F.mse_loss(self.heads["mse"](z), vector).item(),
            "hinge": losses["hinge"].item(),
            "ce": losses["ce"].item() * 1e3,
            "elbo recon": F.mse_loss(self.decoder(self.mean(z)), inputs).item(),
        }
