"""A feature pyramid of timm: a detector that reads all levels, and a classifier that reads the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.case import Case, library

CLASSES = 4


class Detector(nn.Module):
    """Predicts at every position of every level whether there is an object, and its box."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(number, 16, 1) for number in channels)
        self.predictor = nn.Conv2d(16, 5, 3, padding=1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return ``(B, places, 5)``."""
        maps = [self.predictor(lateral(level).relu()) for lateral, level in zip(self.laterals, levels, strict=True)]
        return torch.cat([each.flatten(2) for each in maps], dim=2).mT


def detect_and_classify() -> Case:
    timm = library("timm")
    backbone = timm.create_model("resnet10t", pretrained=False, features_only=True, out_indices=(2, 3, 4))
    channels = backbone.feature_info.channels()
    model = nn.ModuleDict(
        {
            "backbone": backbone,
            "detector": Detector(channels),
            "classifier": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], CLASSES)),
        }
    )
    images, classes = torch.randn(4, 3, 64, 64), torch.randint(CLASSES, (4,))
    places = 8 * 8 + 4 * 4 + 2 * 2
    objects, boxes = torch.rand(4, places) < 0.2, torch.randn(4, places, 4)

    def losses(model: Any) -> dict[str, Tensor]:
        levels = model["backbone"](images)
        found = model["detector"](levels)
        there = F.binary_cross_entropy_with_logits(found[..., 0], objects.float())
        return {
            "detect": there + F.smooth_l1_loss(found[..., 1:][objects], boxes[objects]),
            "classify": F.cross_entropy(model["classifier"](levels[-1]), classes),
        }

    return Case(
        model,
        {"detect": model["detector"], "classify": model["classifier"]},
        {"detect": ("detector.",), "classify": ("classifier.",)},
        losses,
        {"dim": 1},
    )
