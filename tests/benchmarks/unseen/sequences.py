"""Later unseen problems, sequences: forecasts with an anomaly flag; languages in mixed batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from tests.benchmarks.unseen.base import Losses, Problem
from tests.benchmarks.unseen.parts import average_precision, head

NUM_SERIES, LENGTH, TRAIN_LENGTH, WINDOW = 40, 700, 500, 24
HORIZONS = (1, 6, 24)
SIZES, NUM_CONCEPTS, NUM_TOPICS, NUM_TOKENS = (3000, 1500, 600, 300, 100), 100, 6, 16
NUM_TEST = 500


class LastState(nn.Module):
    """The last state of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features ``(B, 32)`` of windows ``(B, WINDOW, 3)``."""
        state: Tensor = self.gru(x)[1][0]
        return state


class Forecast(Problem):
    """The load of 40 series in 1, 6 and 24 hours, and whether there was an anomaly in the last 6 hours."""

    about = "load forecast in 1, 6, 24 hours, and rare anomalies; GRU"
    metrics = ("MAE in 1 hour", "MAE in 6 hours", "MAE in 24 hours", "1 - average precision of anomalies")
    lr = 0.03
    num_steps = 300

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.heads = nn.ModuleDict({str(horizon): head(32, 1) for horizon in HORIZONS} | {"anomaly": head(32, 16, 1)})
        self.backbone = LastState()
        self.model = nn.ModuleList([self.backbone, self.heads])
        hours = torch.arange(LENGTH)
        day = 2 * math.pi * (hours / 24 + self.rand(NUM_SERIES, 1))
        week = 2 * math.pi * (hours / 168 + self.rand(NUM_SERIES, 1))
        load = (0.5 + self.rand(NUM_SERIES, 1)) * day.sin() + 0.4 * (2 * day).sin() + 0.4 * week.sin()
        noise = torch.zeros(NUM_SERIES)
        shocks = 0.3 * self.randn(LENGTH, NUM_SERIES)
        for hour in range(LENGTH):
            noise = 0.9 * noise + shocks[hour]
            load[:, hour] += noise
        self.anomaly = self.rand(NUM_SERIES, LENGTH) < 0.008
        self.load = load + self.anomaly * 1.5 * self.randn(NUM_SERIES, LENGTH).sign()
        self.change = self.load.diff(dim=1, prepend=self.load[:, :1])
        self.clock = (2 * math.pi * hours / 24).sin()

    def scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """Return a cosine."""
        return CosineAnnealingLR(optimizer, self.num_steps)

    def windows(self, series: Tensor, end: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return outputs and targets of windows that end before the hours ``end``."""
        hours = end[:, None] - WINDOW + torch.arange(WINDOW)
        rows = series[:, None]
        x = torch.stack([self.load[rows, hours], self.change[rows, hours], self.clock[hours]], dim=2)
        z = self.backbone(x)
        targets = {str(horizon): self.load[series, end - 1 + horizon] for horizon in HORIZONS}
        targets["anomaly"] = self.anomaly[rows, hours[:, -6:]].any(1).float()
        return {name: of(z).squeeze(1) for name, of in self.heads.items()}, targets

    def losses(self) -> Losses:
        """Return Huber losses of the forecasts, and the cross entropy of the flag."""
        span = TRAIN_LENGTH - max(HORIZONS) - WINDOW
        outputs, targets = self.windows(self.randint(NUM_SERIES, 64), WINDOW + self.randint(span, 64))
        losses = {name: F.smooth_l1_loss(outputs[name], targets[name]) for name in map(str, HORIZONS)}
        return losses | {"anomaly": F.binary_cross_entropy_with_logits(outputs["anomaly"], targets["anomaly"])}

    def errors(self) -> dict[str, float]:
        """Return the errors in the last 200 hours of all series."""
        end = torch.arange(TRAIN_LENGTH + WINDOW, LENGTH - max(HORIZONS))
        outputs, targets = self.windows(torch.arange(NUM_SERIES).repeat_interleave(len(end)), end.repeat(NUM_SERIES))
        values = [F.l1_loss(outputs[name], targets[name]).item() for name in map(str, HORIZONS)]
        values.append(1 - average_precision(outputs["anomaly"], targets["anomaly"]))
        return dict(zip(self.metrics, values, strict=True))


class Languages(Problem):
    """Topics of texts in five languages; a task is absent if a mixed batch has no text in its language."""

    about = "topics of texts in 5 languages of 3000 to 100 texts, in mixed batches: small ones are often absent"
    metrics = tuple(f"error rate of {size} texts" for size in SIZES)
    lr = 0.01
    num_steps = 600
    one_representation = False

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.heads = nn.ModuleDict({str(size): head(32, NUM_TOPICS) for size in SIZES})
        self.backbone = nn.Sequential(
            nn.EmbeddingBag((len(SIZES) + 1) * NUM_CONCEPTS, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)
        )
        self.model = nn.ModuleList([self.backbone, self.heads])
        self.concepts = (1.2 * self.randn(NUM_TOPICS, NUM_CONCEPTS)).softmax(1)
        self.relabel = torch.stack([torch.randperm(NUM_TOPICS, generator=self.generator) for _ in SIZES])
        self.language = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
        self.tokens, self.labels = self.texts(self.language)

    def texts(self, language: Tensor) -> tuple[Tensor, Tensor]:
        """Draw texts: 40 % of the words are common to all languages; every language names the topics differently."""
        topic = self.randint(NUM_TOPICS, len(language))
        words = torch.multinomial(self.concepts[topic], NUM_TOKENS, replacement=True, generator=self.generator)
        common = self.rand(*words.shape) < 0.4
        own = words + NUM_CONCEPTS * (1 + language[:, None])
        return torch.where(common, words, own), self.relabel[language, topic]

    def losses(self) -> Losses:
        """Return the cross entropy of every language in the batch."""
        rows = self.randint(len(self.language), 24)
        z, labels, language = self.backbone(self.tokens[rows]), self.labels[rows], self.language[rows]
        losses: dict[str, Tensor | None] = {}
        for number, (name, of) in enumerate(self.heads.items()):
            mine = language == number
            losses[name] = F.cross_entropy(of(z[mine]), labels[mine]) if mine.any() else None
        return losses

    def errors(self) -> dict[str, float]:
        """Return error rates on new texts."""
        values = []
        for number, of in enumerate(self.heads.values()):
            tokens, labels = self.texts(torch.full((NUM_TEST,), number))
            values.append((of(self.backbone(tokens)).argmax(1) != labels).double().mean().item())
        return dict(zip(self.metrics, values, strict=True))
