"""A segmentation model of torchvision with an auxiliary head, which reads an earlier layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.case import Case, library

CLASSES = 3


def with_auxiliary_head() -> Case:
    models = library("torchvision.models.segmentation")
    model = models.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True
    ).train()
    images, classes = torch.randn(4, 3, 64, 64), torch.randint(CLASSES, (4, 64, 64))

    def losses(model: Any) -> dict[str, Tensor]:
        out = model(images)
        return {"out": F.cross_entropy(out["out"], classes), "aux": 0.5 * F.cross_entropy(out["aux"], classes)}

    return Case(
        model,
        {"out": model.classifier, "aux": model.aux_classifier},
        {"out": ("classifier.",), "aux": ("aux_classifier.",)},
        losses,
        {"dim": 1},
    )
