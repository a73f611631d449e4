"""Later unseen problems, generated images: depth, normals and segments; retrieval and categories."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from tests.benchmarks.unseen.base import Losses, Problem

SIDE, NUM_SCENES, NUM_SEGMENTS = 24, 400, 3
NUM_ITEMS, NUM_NEW, NUM_CATEGORIES, NUM_VIEWS = 60, 40, 6, 10


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution, batch normalization and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Hourglass(nn.Module):
    """A small network from images to maps of the same size, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = conv(3, 12), nn.Sequential(conv(12, 24, 2), conv(24, 24, 2), conv(24, 24))
        self.out = conv(36, 16)

    def forward(self, images: Tensor) -> Tensor:
        """Return the maps ``(B, 16, SIDE, SIDE)``."""
        fine = self.fine(images)
        coarse = F.interpolate(self.coarse(fine), scale_factor=4, mode="bilinear")
        maps: Tensor = self.out(torch.cat([fine, coarse], dim=1))
        return maps


class Scenes(Problem):
    """Depth, surface normals and segments of shaded balls and tilted boards before a wall."""

    about = "depth, normals, segments of generated scenes; convolutional"
    metrics = ("mean depth error", "mean angle of normals", "1 - mean IoU")
    lr = 0.03
    num_steps = 200
    dim = 1

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        outputs = {"depth": 1, "normals": 3, "segments": NUM_SEGMENTS}
        self.heads = nn.ModuleDict({name: nn.Conv2d(16, num, 3, padding=1) for name, num in outputs.items()})
        self.backbone = Hourglass()
        self.model = nn.ModuleList([self.backbone, self.heads])
        self.images, self.depth, self.normals, self.segments = self.scenes(NUM_SCENES + 200)

    def scenes(self, num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw a wall, two boards and two balls, lit from a random side, in random colors."""
        v, u = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
        depth = torch.full((num, SIDE, SIDE), 10.0)
        normals, albedo = torch.zeros(num, 3, SIDE, SIDE), torch.zeros(num, 3, SIDE, SIDE)
        segments = torch.zeros(num, SIDE, SIDE, dtype=torch.long)
        for segment in (0, 1, 1, 2, 2):
            center, size = 1.4 * self.rand(num, 2, 1, 1) - 0.7, 0.25 + 0.25 * self.rand(num, 1, 1)
            du, dv, distance = u - center[:, 0], v - center[:, 1], 1 + self.rand(num, 1, 1) + (segment == 0)
            if segment == 2:
                inside = du.square() + dv.square() < size.square()
                height = (size.square() - du.square() - dv.square()).clamp_min(1e-6).sqrt()
                here, normal = distance - height, torch.stack([du, dv, height], dim=1)
            else:
                slope = 0.5 * self.randn(num, 2, 1, 1)
                inside = (torch.maximum(du.abs(), dv.abs()) < size) | torch.tensor(segment == 0)
                here = distance + slope[:, 0] * du + slope[:, 1] * dv
                normal = torch.cat([slope, torch.ones(num, 1, 1, 1)], dim=1).expand(-1, -1, SIDE, SIDE)
            front = inside & ((here < depth) | torch.tensor(segment == 0))
            depth, segments = torch.where(front, here, depth), segments.masked_fill(front, segment)
            normals = torch.where(front[:, None], F.normalize(normal, dim=1), normals)
            albedo = torch.where(front[:, None], 0.4 + 0.6 * self.rand(num, 3, 1, 1), albedo)
        light = F.normalize(torch.cat([self.randn(num, 2, 1, 1), torch.ones(num, 1, 1, 1)], dim=1), dim=1)
        shading = (normals * light).sum(1, keepdim=True).clamp_min(0)
        images = albedo * (0.2 + shading) / depth[:, None].clamp_min(0.5) + 0.03 * self.randn(num, 3, SIDE, SIDE)
        return images, depth, normals, segments

    def optimizer(self) -> Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.01)

    def scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """Return one cycle."""
        return OneCycleLR(optimizer, self.lr, total_steps=self.num_steps)

    def predict(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return depth, normals, and the logits of the segments."""
        z = self.backbone(self.images[rows])
        normals = F.normalize(self.heads["normals"](z), dim=1)
        return self.heads["depth"](z).squeeze(1), normals, self.heads["segments"](z)

    def losses(self) -> Losses:
        """Return the absolute error of the depth, one minus the cosine of the normals, and the cross entropy."""
        rows = self.randint(NUM_SCENES, 16)
        depth, normals, segments = self.predict(rows)
        return {
            "depth": F.l1_loss(depth, self.depth[rows]),
            "normals": 1 - (normals * self.normals[rows]).sum(1).mean(),
            "segments": F.cross_entropy(segments, self.segments[rows]),
        }

    def errors(self) -> dict[str, float]:
        """Return the errors on 200 other scenes."""
        rows = torch.arange(NUM_SCENES, len(self.images))
        depth, normals, logits = self.predict(rows)
        cosines = (normals * self.normals[rows]).sum(1).clamp(-1, 1)
        guess, segments = logits.argmax(1), self.segments[rows]
        overlaps = [
            ((guess == k) & (segments == k)).sum() / ((guess == k) | (segments == k)).sum().clamp_min(1)
            for k in range(NUM_SEGMENTS)
        ]
        values = (
            F.l1_loss(depth, self.depth[rows]).item(),
            cosines.acos().rad2deg().mean().item(),
            1 - torch.stack(overlaps).mean().item(),
        )
        return dict(zip(self.metrics, values, strict=True))


class Retrieval(Problem):
    """Find other views of items that were not in training, with a triplet loss that reaches zero, and categories."""

    about = "retrieval of new items with batch-hard triplets, and their category; SGD with momentum"
    metrics = ("1 - recall@1 of new items", "error rate of their categories")
    lr = 0.15
    num_steps = 300

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.heads = nn.ModuleDict({"embedding": nn.Linear(48, 16), "category": nn.Linear(48, NUM_CATEGORIES)})
        self.backbone = nn.Sequential(
            conv(3, 16), conv(16, 32, 2), conv(32, 48, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.model = nn.ModuleList([self.backbone, self.heads])
        num = NUM_ITEMS + NUM_NEW
        self.category = torch.arange(num) % NUM_CATEGORIES
        shared, own = self.randn(NUM_CATEGORIES, 3, 4, 4), self.randn(num, 3, 4, 4)
        looks = F.interpolate(shared[self.category] + own, size=16, mode="bilinear")
        self.views = torch.stack([self.view(looks) for _ in range(NUM_VIEWS)], dim=1)

    def view(self, looks: Tensor) -> Tensor:
        """Return all items with random crops, brightness and noise."""
        top, left = (int(of) for of in self.randint(5, 2))
        crops = looks[:, :, top : top + 12, left : left + 12]
        return crops * (0.7 + 0.6 * self.rand(len(looks), 1, 1, 1)) + 0.5 * self.randn(*crops.shape)

    def optimizer(self) -> Optimizer:
        """Return SGD with momentum and weight decay."""
        return torch.optim.SGD(self.model.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """Return a cosine."""
        return CosineAnnealingLR(optimizer, self.num_steps)

    def losses(self) -> Losses:
        """Return the loss of the hardest triplets among 12 items with 4 views, and the cross entropy."""
        items = torch.randperm(NUM_ITEMS, generator=self.generator)[:12].repeat_interleave(4)
        z = self.backbone(self.views[items, self.randint(NUM_VIEWS, len(items))])
        embeddings = F.normalize(self.heads["embedding"](z), dim=1)
        distances, same = 1 - embeddings @ embeddings.T, items[:, None] == items
        farthest = distances.masked_fill(~same, -1).amax(1)
        nearest = distances.masked_fill(same, 3).amin(1)
        return {
            "embedding": (0.2 + farthest - nearest).relu().mean(),
            "category": F.cross_entropy(self.heads["category"](z), self.category[items], label_smoothing=0.1),
        }

    def errors(self) -> dict[str, float]:
        """Return how often the nearest other view is of another item, and the error rate of the category."""
        z = self.backbone(self.views[NUM_ITEMS:].flatten(0, 1))
        items = torch.arange(NUM_NEW).repeat_interleave(NUM_VIEWS)
        embeddings = F.normalize(self.heads["embedding"](z), dim=1)
        nearest = (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1)
        wrong = self.heads["category"](z).argmax(1) != self.category[NUM_ITEMS:][items]
        values = ((items[nearest] != items).double().mean().item(), wrong.double().mean().item())
        return dict(zip(self.metrics, values, strict=True))
