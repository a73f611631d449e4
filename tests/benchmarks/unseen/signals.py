"""A judge's problems, signals: sequences of events; keypoints in images; noisy digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from tests.benchmarks.unseen.base import Losses, Problem
from tests.benchmarks.unseen.digits import OnDigits
from tests.benchmarks.unseen.parts import error_rate, head, mlp


class Events(Problem):
    """Sequences of 24 events: when the next one is, as a distribution, and of which kind."""

    about = "event sequences: time (likelihood) and kind of the next; GRU, AdamW, one cycle"
    metrics = ("time L1", "kind")
    lr = 1e-2
    num_steps = 300
    num_kinds, length, num_training = 5, 24, 400

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kinds, self.log_gaps = self._sample(2 * self.num_training)
        self.embedding, self.gru = nn.Embedding(self.num_kinds, 8), nn.GRU(9, 32, batch_first=True)
        self.heads = nn.ModuleDict({"time": mlp(32, 32, 2), "kind": mlp(32, 32, self.num_kinds)})
        self.model = nn.ModuleList([self.embedding, self.gru, self.heads])

    def _sample(self, count: int) -> tuple[Tensor, Tensor]:
        kinds = self.num_kinds
        delays, transitions = 0.7 * self.randn(kinds, kinds), 1.3 * self.randn(kinds, kinds)
        before, slow = 0.8 * self.randn(kinds, kinds), self.randn(kinds)
        drawn, log_gaps = list(self.randint(kinds, 2, count)), [torch.zeros(count)] * 2
        for _ in range(self.length):
            log_gap = 1 + delays[drawn[-1], drawn[-2]] + 0.5 * (log_gaps[-1] - 1) + 0.4 * self.randn(count)
            logits = transitions[drawn[-1]] + before[drawn[-2]] + slow * (log_gap - 1)[:, None]
            drawn.append(torch.multinomial(logits.softmax(1), 1, generator=self.generator)[:, 0])
            log_gaps.append(log_gap)
        return torch.stack(drawn, dim=1), torch.stack(log_gaps, dim=1)

    def optimizer(self) -> Optimizer:
        """Return AdamW."""
        return AdamW(self.model.parameters(), lr=self.lr, weight_decay=1e-2)

    def scheduler(self, optimizer: Optimizer) -> OneCycleLR:
        """Follow one cycle."""
        return OneCycleLR(optimizer, self.lr, total_steps=self.num_steps)

    def _predict(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        gaps = self.log_gaps[rows, :-1].exp().log1p()
        z = self.gru(torch.cat([self.embedding(self.kinds[rows, :-1]), gaps[..., None]], dim=2))[0][:, 1:]
        return self.heads["time"](z), self.heads["kind"](z)

    def losses(self) -> Losses:
        """Return a negative log-normal likelihood and a cross entropy of 32 sequences."""
        rows = self.randint(self.num_training, 32)
        time, kind = self._predict(rows)
        gap = torch.distributions.LogNormal(time[..., 0], F.softplus(time[..., 1]) + 1e-2)
        return {
            "time": -gap.log_prob(self.log_gaps[rows, 2:].exp()).mean(),  # type: ignore[no-untyped-call]
            "kind": F.cross_entropy(kind.flatten(0, 1), self.kinds[rows, 2:].flatten()),
        }

    def errors(self) -> dict[str, float]:
        """Return the error of the logarithm of the time, and of the kind."""
        test = torch.arange(self.num_training, len(self.kinds))
        time, kind = self._predict(test)
        return {
            "time L1": (time[..., 0] - self.log_gaps[test, 2:]).abs().mean().item(),
            "kind": error_rate(kind, self.kinds[test, 2:]),
        }


class Keypoints(Problem):
    """Images with three keypoints, some of them hidden, and the mask of all, whose head reads a middle layer."""

    about = "images: three keypoints, which are visible, and a mask from a middle layer; AdamW, cosine"
    metrics = ("distance", "visibility", "mask 1-IoU")
    lr = 1e-2
    num_steps = 350
    dim = 1
    one_representation = False
    size, num_training = 20, 500

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.points, self.visible, self.images, self.masks = self._sample(2 * self.num_training)
        self.early = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(12, 24, 3, padding=1), nn.ReLU()),
        )
        self.late = nn.Sequential(
            nn.Conv2d(24, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 48)
        )
        self.heads = nn.ModuleDict(
            {
                "points": head(48, 6),
                "visible": head(48, 3),
                "mask": nn.Conv2d(24, 1, 3, padding=1),
            }
        )
        self.model = nn.ModuleList([self.early, self.late, self.heads])

    def _sample(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        points, visible = 0.1 + 0.8 * self.rand(count, 3, 2), (self.rand(count, 3) > 0.3).float()
        places = (torch.arange(self.size) + 0.5) / self.size
        dy, dx = places - points[..., :1], places - points[..., 1:]
        squares = dy.square()[..., :, None] + dx.square()[..., None, :]
        spot, ring, hole = (squares[:, k] for k in range(3))
        shapes = [(-spot / 0.008).exp(), ((ring.sqrt() - 0.1).abs() < 0.04).float(), -(-hole / 0.02).exp()]
        blobs = torch.stack(shapes, dim=1) * visible[..., None, None]
        images = blobs.sum(1, keepdim=True) + 0.25 * self.randn(count, 1, self.size, self.size)
        covered = (blobs.abs() > 0.4).float().amax(1, keepdim=True)
        return points, visible, images, (F.avg_pool2d(covered, 2) > 0.3).float()

    def optimizer(self) -> Optimizer:
        """Return AdamW."""
        return AdamW(self.model.parameters(), lr=self.lr)

    def scheduler(self, optimizer: Optimizer) -> CosineAnnealingLR:
        """Follow a cosine."""
        return CosineAnnealingLR(optimizer, self.num_steps)

    def _predict(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = self.early(images)
        z = self.late(middle)
        return self.heads["points"](z).unflatten(1, (3, 2)), self.heads["visible"](z), self.heads["mask"](middle)

    def losses(self) -> Losses:
        """Return an absolute error of the visible points, and two cross entropies, of 32 images."""
        rows = self.randint(self.num_training, 32)
        points, visible, mask = self._predict(self.images[rows])
        off = (points - self.points[rows]).abs() * self.visible[rows][..., None]
        return {
            "points": off.sum() / (2 * self.visible[rows].sum()).clamp_min(1),
            "visible": F.binary_cross_entropy_with_logits(visible, self.visible[rows]),
            "mask": F.binary_cross_entropy_with_logits(mask, self.masks[rows]),
        }

    def errors(self) -> dict[str, float]:
        """Return the distance of the visible points, the error of the visibility, and that of the mask."""
        points, visible, mask = self._predict(self.images[self.num_training :])
        true = self.visible[self.num_training :]
        distance = (points - self.points[self.num_training :]).norm(dim=2) * true
        found, masks = mask > 0, self.masks[self.num_training :] > 0
        return {
            "distance": (distance.sum() / true.sum()).item(),
            "visibility": error_rate(torch.stack([-visible, visible], dim=-1), true.long()),
            "mask 1-IoU": 1 - ((found & masks).sum() / (found | masks).sum()).item(),
        }


class Denoising(OnDigits):
    """350 digits with noise: the digit without it, and its class; SGD with momentum."""

    about = "350 digits with noise: reconstruction and class; SGD with momentum; overfits"
    metrics = ("reconstruction", "class")
    lr = 3e-2
    num_steps = 1500
    num_training = 350

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.clean = self.images.flatten(1)
        self.noisy = self.clean + 0.35 * self.randn(*self.clean.shape)
        self.backbone = mlp(64, 128, 64)
        self.heads = nn.ModuleDict(
            {
                "reconstruction": head(64, 96, 64),
                "class": head(64, 10),
            }
        )
        self.model = nn.ModuleList([self.backbone, self.heads])

    def optimizer(self) -> Optimizer:
        """Return SGD with momentum."""
        return SGD(self.model.parameters(), lr=self.lr, momentum=0.9)

    def losses(self) -> Losses:
        """Return a squared error and a cross entropy of 16 digits with new noise."""
        rows = self.randint(self.num_training, 16)
        z = self.backbone(self.clean[rows] + 0.35 * self.randn(16, 64))
        return {
            "reconstruction": F.mse_loss(self.heads["reconstruction"](z), self.clean[rows]),
            "class": F.cross_entropy(self.heads["class"](z), self.labels[rows]),
        }

    def errors(self) -> dict[str, float]:
        """Return the squared error, and the error of the class."""
        z, test = self.backbone(self.noisy[self.num_training :]), slice(self.num_training, None)
        return {
            "reconstruction": F.mse_loss(self.heads["reconstruction"](z), self.clean[test]).item(),
            "class": error_rate(self.heads["class"](z), self.labels[test]),
        }
