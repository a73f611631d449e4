"""A judge's problems, tables: reviews with rare labels; noisy survival data; many attributes of different rates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from tests.benchmarks.unseen.base import Losses, Problem
from tests.benchmarks.unseen.parts import average_precision, error_rate, head, mlp, rank_error


class Reviews(Problem):
    """Bags of words: six rare labels, and one to five stars; batches of 8, dropout."""

    about = "bags of words: six rare labels in one loss, one to five stars; batches of 8"
    metrics = ("labels 1-AP", "stars L1")
    lr = 1e-2
    num_steps = 1500
    num_words, num_topics, num_training = 300, 8, 1000

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        total = self.num_training + 1500
        topics = self._dirichlet(0.08, self.num_topics, self.num_words)
        mixtures = self._dirichlet(0.3, total, self.num_topics)
        length = 20 + self.randint(60, total)
        longest = torch.multinomial(mixtures @ topics, 79, replacement=True, generator=self.generator)
        is_word = (torch.arange(79) < length[:, None]).float()
        words = torch.zeros(total, self.num_words).scatter_add_(1, longest, is_word)
        sentiment = self.randn(self.num_words) * (self.rand(self.num_words) < 0.3)
        stars = words @ sentiment / length.sqrt()
        stars = 3.6 + (stars - stars.mean()) / stars.std() + 0.4 * self.randn(total)
        self.words, self.stars = words.log1p(), stars.round().clamp(1, 5)
        is_rare = mixtures[:, :6] > torch.tensor([0.35, 0.45, 0.55, 0.6, 0.7, 0.75])
        self.labels = (is_rare ^ (self.rand(total, 6) < 0.01)).float()
        self.backbone = nn.Sequential(nn.Linear(self.num_words, 96), nn.ReLU(), nn.Dropout(0.2), nn.Linear(96, 48))
        self.heads = nn.ModuleDict({"labels": head(48, 6), "stars": head(48, 1)})
        self.model = nn.ModuleList([self.backbone, self.heads])

    def _dirichlet(self, concentration: float, rows: int, columns: int) -> Tensor:
        gammas = torch._standard_gamma(torch.full((rows, columns), concentration), generator=self.generator)
        return gammas / gammas.sum(1, keepdim=True)

    def losses(self) -> Losses:
        """Return a cross entropy and a squared error of 8 reviews."""
        rows = self.randint(self.num_training, 8)
        z = self.backbone(self.words[rows])
        return {
            "labels": F.binary_cross_entropy_with_logits(self.heads["labels"](z), self.labels[rows]),
            "stars": F.mse_loss(self.heads["stars"](z)[:, 0], self.stars[rows]),
        }

    def errors(self) -> dict[str, float]:
        """Return one minus the mean average precision, and the error of the stars."""
        words, labels, stars = (of[self.num_training :] for of in (self.words, self.labels, self.stars))
        z = self.backbone(words)
        columns = zip(self.heads["labels"](z).T, labels.T, strict=True)
        precisions = [average_precision(scores, label) for scores, label in columns]
        return {
            "labels 1-AP": 1 - sum(precisions) / len(precisions),
            "stars L1": (self.heads["stars"](z)[:, 0] - stars).abs().mean().item(),
        }


class Survival(Problem):
    """500 patients, 20 features: a risk, a subgroup with 15 % wrong labels, a lab value that half have, and visits."""

    about = "500 patients: Cox likelihood, subgroup with wrong labels, a value that half have, counts; overfits"
    metrics = ("risk", "subgroup", "lab L1", "visits")
    lr = 1e-3
    num_steps = 1000
    num_training = 500

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        total = self.num_training + 1500
        self.x = self.randn(total, 20)
        hidden = torch.tanh(1.5 * self.x @ self.randn(20, 6) / math.sqrt(20))
        risk = 1.2 * hidden[:, 0] + 0.8 * hidden[:, 1] * hidden[:, 2] + 0.5 * self.x[:, 0]
        event = -24 * self._positive(total).log() * (-risk).exp()
        censored = -40 * self._positive(total).log()
        self.time, self.had_event = torch.minimum(event, censored), event <= censored
        self.subgroup = (2 * hidden[:, [0, 3, 4]] + 0.3 * self.randn(total, 3)).argmax(1)
        self.recorded = torch.where(self.rand(total) < 0.15, self.randint(3, total), self.subgroup)
        self.lab = 5.5 + 1.2 * hidden[:, 1] + 0.8 * hidden[:, 5] + 0.5 * self.randn(total)
        self.has_lab = self.rand(total) < 0.5
        self.visits = torch.poisson((0.6 + 0.7 * hidden[:, 0] - 0.5 * hidden[:, 4]).exp(), generator=self.generator)
        self.backbone = mlp(20, 64, 32)
        self.heads = nn.ModuleDict(
            {name: head(32, size) for name, size in {"risk": 1, "subgroup": 3, "lab": 1, "visits": 1}.items()}
        )
        self.model = nn.ModuleList([self.backbone, self.heads])

    def _positive(self, count: int) -> Tensor:
        return self.rand(count).clamp_min(1e-6)

    def optimizer(self) -> Optimizer:
        """Return AdamW."""
        return AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.05)

    def losses(self) -> Losses:
        """Return a Cox partial likelihood, a cross entropy, a squared error and a Poisson likelihood of 64 patients."""
        rows = self.randint(self.num_training, 64)
        rows = rows[self.time[rows].argsort(descending=True)]
        z = self.backbone(self.x[rows])
        risk, has_lab, had_event = self.heads["risk"](z)[:, 0], self.has_lab[rows], self.had_event[rows]
        at_risk = risk.logcumsumexp(0)
        lab = (self.heads["lab"](z)[:, 0] - self.lab[rows]).square() * has_lab
        return {
            "risk": ((at_risk - risk) * had_event).sum() / had_event.sum().clamp_min(1),
            "subgroup": F.cross_entropy(self.heads["subgroup"](z), self.recorded[rows]),
            "lab": lab.sum() / has_lab.sum().clamp_min(1),
            "visits": F.poisson_nll_loss(self.heads["visits"](z)[:, 0], self.visits[rows]),
        }

    def errors(self) -> dict[str, float]:
        """Return one minus the concordance, the error of the true subgroup and the lab value, and the deviance."""
        test = torch.arange(self.num_training, len(self.x))
        z = self.backbone(self.x[test])
        risk, time = self.heads["risk"](z)[:, 0], self.time[test]
        comparable = (time[:, None] < time) & self.had_event[test][:, None]
        concordant = (risk[:, None] > risk) & comparable
        rate, visits = self.heads["visits"](z)[:, 0].clamp_max(20), self.visits[test]
        deviance = 2 * (torch.xlogy(visits, visits) - visits * rate - visits + rate.exp())
        return {
            "risk": 1 - (concordant.sum() / comparable.sum()).item(),
            "subgroup": error_rate(self.heads["subgroup"](z), self.subgroup[test]),
            "lab L1": (self.heads["lab"](z)[:, 0] - self.lab[test]).abs().mean().item(),
            "visits": deviance.mean().item(),
        }


class Attributes(Problem):
    """Ten classes of very different sizes, and eleven attributes of 50 to 5 %, some with 10 % wrong labels."""

    about = "long-tailed classes and eleven attributes of 50 to 5 %; SGD with momentum, cosine schedule"
    rates = (0.5, 0.5, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05)
    metrics = ("class", *(f"attribute {k}" for k in range(len(rates))))
    lr = 1e-2
    num_steps = 800
    num_training = 1500

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        sizes, num_test = 0.65 ** torch.arange(10.0), 2000
        drawn = torch.multinomial(sizes, self.num_training, replacement=True, generator=self.generator)
        self.label = torch.cat([drawn, torch.arange(num_test) % 10])
        total = len(self.label)
        hidden = 1.1 * self.randn(10, 10)[self.label] + self.randn(total, 10)
        self.x = torch.tanh(hidden @ self.randn(10, 40) / 3) @ self.randn(40, 40) / 6 + 0.3 * self.randn(total, 40)
        self.true, self.recorded = [], []
        for k, rate in enumerate(self.rates):
            score = hidden @ self.randn(10) + 0.5 * (k % 2) * (hidden @ self.randn(10)) * (hidden @ self.randn(10)) / 3
            has = score > score[: self.num_training].quantile(1 - rate)
            is_wrong = self.rand(total) < (0.1 if k % 3 == 0 else 0.0)
            self.true.append(has.float())
            self.recorded.append((has ^ is_wrong).float())
        self.backbone = mlp(40, 96, 96, 48)
        self.heads = nn.ModuleDict({name: head(48, 10 if name == "class" else 1) for name in self.metrics})
        self.model = nn.ModuleList([self.backbone, self.heads])

    def optimizer(self) -> Optimizer:
        """Return SGD with momentum."""
        return SGD(self.model.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def scheduler(self, optimizer: Optimizer) -> CosineAnnealingLR:
        """Follow a cosine."""
        return CosineAnnealingLR(optimizer, self.num_steps)

    def losses(self) -> Losses:
        """Return the cross entropies of 128 samples."""
        rows = self.randint(self.num_training, 128)
        z = self.backbone(self.x[rows])
        name, *attributes = self.metrics
        losses = {name: F.cross_entropy(self.heads[name](z), self.label[rows])}
        for name, recorded in zip(attributes, self.recorded, strict=True):
            losses[name] = F.binary_cross_entropy_with_logits(self.heads[name](z)[:, 0], recorded[rows])
        return losses

    def errors(self) -> dict[str, float]:
        """Return the error of the class, whose sizes are equal now, and one minus the area under each curve."""
        test = slice(self.num_training, None)
        z = self.backbone(self.x[test])
        name, *attributes = self.metrics
        errors = {name: error_rate(self.heads[name](z), self.label[test])}
        for name, true in zip(attributes, self.true, strict=True):
            errors[name] = rank_error(self.heads[name](z)[:, 0], true[test])
        return errors
