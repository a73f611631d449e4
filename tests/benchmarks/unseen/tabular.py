"""Later unseen problems, tables: a recommender with rare purchases; patients with negative likelihoods."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from tests.benchmarks.unseen.base import Losses, Problem
from tests.benchmarks.unseen.parts import head, mlp, rank_error

NUM_USERS, NUM_ITEMS, NUM_IMPRESSIONS = 200, 100, 16000
NUM_PATIENTS, NUM_FEATURES, NUM_INTERVALS, NUM_COMPLICATIONS = 800, 20, 8, 5


class Impressions(nn.Module):
    """Embeddings of users and items, and the context, through shared layers."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(NUM_USERS, 8), nn.Embedding(NUM_ITEMS, 8)
        self.layers = mlp(22, 64, 32)

    def forward(self, user: Tensor, item: Tensor, context: Tensor) -> Tensor:
        """Return the features ``(B, 32)``."""
        features: Tensor = self.layers(torch.cat([self.user(user), self.item(item), context], dim=1))
        return features


class Recommender(Problem):
    """Click, rare purchase, and dwell time of those who clicked, with Adagrad and 6 epochs."""

    about = "recommender: click, rare purchase, dwell time of clicks; Adagrad"
    metrics = ("1 - AUC of clicks", "1 - AUC of purchases", "RMSE of log dwell time")
    lr = 0.1
    num_steps = 400

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.heads = nn.ModuleDict({name: head(32, 16, 1) for name in ("click", "purchase", "dwell")})
        self.backbone = Impressions()
        self.model = nn.ModuleList([self.backbone, self.heads])
        taste, budget = self.randn(NUM_USERS, 4), self.randn(NUM_USERS)
        style, price, popularity = self.randn(NUM_ITEMS, 4), self.randn(NUM_ITEMS), self.randn(NUM_ITEMS)
        num = 2 * NUM_IMPRESSIONS
        self.user, self.item = self.randint(NUM_USERS, num), self.randint(NUM_ITEMS, num)
        self.context = self.randn(num, 6)
        match = (taste[self.user] * style[self.item]).sum(1) / 2
        click = match + 0.7 * popularity[self.item] + 0.5 * self.context[:, 0] - 1.5
        gap = budget[self.user] - price[self.item]
        purchase = gap + 0.5 * match + 0.5 * self.context[:, 1] - 2.0
        self.click = (self.rand(num) < click.sigmoid()).float()
        self.purchase = self.click * (self.rand(num) < purchase.sigmoid())
        self.dwell = 0.4 * match + 0.3 * self.context[:, 2].abs() + 0.2 * gap + 0.5 * self.randn(num)

    def optimizer(self) -> Optimizer:
        """Return Adagrad, as is usual with embedding tables."""
        return torch.optim.Adagrad(self.model.parameters(), lr=self.lr)

    def predict(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the logits, and the predicted log dwell time."""
        z = self.backbone(self.user[rows], self.item[rows], self.context[rows])
        return {name: of(z).squeeze(1) for name, of in self.heads.items()}

    def losses(self) -> Losses:
        """Return cross entropies over all impressions, and the squared error over clicks."""
        rows = self.randint(NUM_IMPRESSIONS, 256)
        outputs, clicked = self.predict(rows), self.click[rows] > 0
        return {
            "click": F.binary_cross_entropy_with_logits(outputs["click"], self.click[rows]),
            "purchase": F.binary_cross_entropy_with_logits(outputs["purchase"], self.purchase[rows]),
            "dwell": F.mse_loss(outputs["dwell"][clicked], self.dwell[rows][clicked]),
        }

    def errors(self) -> dict[str, float]:
        """Return the errors on the other half of the impressions."""
        rows = torch.arange(NUM_IMPRESSIONS, 2 * NUM_IMPRESSIONS)
        outputs, clicked = self.predict(rows), self.click[rows] > 0
        values = (
            rank_error(outputs["click"], self.click[rows]),
            rank_error(outputs["purchase"], self.purchase[rows]),
            F.mse_loss(outputs["dwell"][clicked], self.dwell[rows][clicked]).sqrt().item(),
        )
        return dict(zip(self.metrics, values, strict=True))


class Patients(Problem):
    """Discrete-time survival, a lab value with its variance (negative losses), and rare complications; overfits."""

    about = "800 patients: censored survival, lab value with its variance (negative losses), rare complications"
    metrics = ("1 - concordance", "CRPS of the lab value", "1 - macro AUC of complications")
    lr = 0.003
    num_steps = 300

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        outputs = {"survival": NUM_INTERVALS, "lab": 2, "complications": NUM_COMPLICATIONS}
        self.heads = nn.ModuleDict({name: head(32, num) for name, num in outputs.items()})
        self.backbone = nn.Sequential(nn.Linear(2 * NUM_FEATURES, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 32))
        self.model = nn.ModuleList([self.backbone, self.heads])
        num = NUM_PATIENTS + 2000
        factors = self.randn(num, 5)
        x = factors @ self.randn(5, NUM_FEATURES) / math.sqrt(5) + 0.7 * self.randn(num, NUM_FEATURES)
        known = (self.rand(num, NUM_FEATURES) > 0.1).float()
        self.x = torch.cat([x * known, known], dim=1)
        risk = factors[:, 0] + 0.5 * factors[:, 1] * factors[:, 2]
        death = -self.rand(num).log() / (0.15 * risk.exp())
        censoring = 12 * self.rand(num)
        self.event = death <= censoring.clamp(max=NUM_INTERVALS)
        self.time = torch.minimum(death, censoring.clamp(max=NUM_INTERVALS - 1e-3))
        spread = 0.15 * (0.6 * factors[:, 3]).exp()
        self.lab = 0.4 * (factors[:, 1] + factors[:, 4]).tanh() + 0.2 * x[:, 0] + spread * self.randn(num)
        logits = factors @ self.randn(5, NUM_COMPLICATIONS) - torch.linspace(1.5, 4.5, NUM_COMPLICATIONS)
        self.complications = (self.rand(num, NUM_COMPLICATIONS) < logits.sigmoid()).float()

    def optimizer(self) -> Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.01)

    def predict(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the logits of the hazards, mean and log variance of the lab value, and logits."""
        z = self.backbone(self.x[rows])
        return {name: of(z) for name, of in self.heads.items()}

    def losses(self) -> Losses:
        """Return negative log-likelihoods: of death or censoring, of the lab value, of the complications."""
        rows = self.randint(NUM_PATIENTS, 64)
        outputs = self.predict(rows)
        interval = self.time[rows].long()
        dies = F.one_hot(interval, NUM_INTERVALS) * self.event[rows, None]
        alive = torch.arange(NUM_INTERVALS) <= interval[:, None]
        hazards = F.binary_cross_entropy_with_logits(outputs["survival"], dies.float(), reduction="none")
        mean, log_variance = outputs["lab"].unbind(1)
        return {
            "survival": (hazards * alive).sum(1).mean(),
            "lab": F.gaussian_nll_loss(mean, self.lab[rows], log_variance.exp()),
            "complications": F.binary_cross_entropy_with_logits(outputs["complications"], self.complications[rows]),
        }

    def errors(self) -> dict[str, float]:
        """Return the errors on 2000 other patients."""
        rows = torch.arange(NUM_PATIENTS, len(self.x))
        outputs, time = self.predict(rows), self.time[rows]
        score = F.logsigmoid(-outputs["survival"]).sum(1)  # of the log probability to survive all intervals
        comparable = self.event[rows, None] & (time[:, None] < time)
        concordance = (score[:, None] < score)[comparable].double().mean().item()
        mean, deviation = outputs["lab"][:, 0], (outputs["lab"][:, 1] / 2).exp()
        u = (self.lab[rows] - mean) / deviation
        density = (-u.square() / 2).exp() / math.sqrt(2 * math.pi)
        crps = deviation * (u * (2 * torch.special.ndtr(u) - 1) + 2 * density - 1 / math.sqrt(math.pi))
        ranks = [
            rank_error(scores, labels)
            for scores, labels in zip(outputs["complications"].T, self.complications[rows].T, strict=True)
        ]
        values = (1 - concordance, crps.mean().item(), sum(ranks) / NUM_COMPLICATIONS)
        return dict(zip(self.metrics, values, strict=True))
