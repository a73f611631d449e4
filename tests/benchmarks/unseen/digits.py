"""Unseen problems on scikit-learn's digits: an autoencoder, useless auxiliary tasks, fine-tuning."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from tests.benchmarks.unseen.base import Losses, Problem
from tests.benchmarks.unseen.parts import head, mlp


class OnDigits(Problem):
    """The digits in a random order.

    Attributes:
        images: Shape ``(1797, 8, 8)``, values from 0 to 1.
        labels: Their digits.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        digits = load_digits()
        order = torch.randperm(len(digits.images), generator=self.generator)
        self.images = (torch.tensor(digits.images, dtype=torch.float32) / 16)[order]
        self.labels = torch.tensor(digits.target)[order]


class Autoencoder(OnDigits):
    """Reconstruction, summed over pixels; classification with 100 labels; a contrastive loss of two noisy views."""

    about = "digits: reconstruction, few labels, contrast of views"
    metrics = ("rec", "cls", "con")
    lr = 3e-3
    num_steps = 400
    one_representation = False
    num_training = 1000

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.pixels = self.images.flatten(1)
        self.backbone = mlp(64, 128, 64, 32)
        self.heads = nn.ModuleDict({"rec": head(32, 64, 64), "cls": head(32, 10), "con": head(32, 32, 16)})
        self.model = nn.ModuleList([self.backbone, self.heads])

    @staticmethod
    def _views(pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Add noise in the first view, and erase pixels in the second. ``(n, 64)`` to ``(2 n, 64)``."""
        noise = 0.2 * torch.randn(pixels.shape, generator=generator)
        return torch.cat([pixels + noise, pixels * (torch.rand(pixels.shape, generator=generator) > 0.2)])

    @staticmethod
    def _contrast(projections: Tensor) -> Tensor:
        unit = F.normalize(projections, dim=1)
        similarities = unit @ unit.T / 0.2
        similarities = similarities.masked_fill(torch.eye(len(unit), dtype=torch.bool), -1e9)
        other_view = torch.arange(len(unit)).roll(len(unit) // 2)
        return F.cross_entropy(similarities, other_view)

    def losses(self) -> Losses:
        """Reconstruct from the first view."""
        rows, labelled = self.randint(self.num_training, 64), self.randint(100, 32)
        pixels = self.pixels[rows]
        z = self.backbone(torch.cat([self._views(pixels, self.generator), self.pixels[labelled]]))
        return {
            "rec": F.mse_loss(self.heads["rec"](z[:64]), pixels, reduction="none").sum(1).mean(),
            "cls": F.cross_entropy(self.heads["cls"](z[128:]), self.labels[labelled]),
            "con": self._contrast(self.heads["con"](z[:128])),
        }

    def errors(self) -> dict[str, float]:
        """Return the squared error of the reconstruction, the share of wrong labels and the contrastive loss."""
        pixels = self.pixels[self.num_training :]
        z = self.backbone(pixels)
        views = self.backbone(self._views(pixels, torch.Generator().manual_seed(3)))
        wrong = self.heads["cls"](z).argmax(1) != self.labels[self.num_training :]
        return {
            "rec": F.mse_loss(self.heads["rec"](z), pixels).item() * 64,
            "cls": wrong.float().mean().item(),
            "con": self._contrast(self.heads["con"](views)).item(),
        }


class Auxiliary(OnDigits):
    """The digits of 200 images are the main task; the others do not help it.

    The others are a random class per image, random numbers per image, and the brightness of the upper rows.
    """

    about = "digits beside auxiliary tasks that do not help"
    metrics = ("main CE", "main %", "corner")
    lr = 1e-2
    num_steps = 500
    num_training = 200
    first_test = 1000

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.pixels = self.images.flatten(1)
        self.classes = self.randint(10, len(self.pixels))
        self.numbers = self.randn(len(self.pixels), 5)
        self.backbone = mlp(64, 64, 48)
        sizes = {"main": 10, "hash": 10, "noise": 5, "corner": 1}
        self.heads = nn.ModuleDict({name: head(48, size) for name, size in sizes.items()})
        self.model = nn.ModuleList([self.backbone, self.heads])

    def losses(self) -> Losses:
        """Return two cross entropies and two squared errors."""
        rows = self.randint(self.num_training, 32)
        pixels = self.pixels[rows]
        z = self.backbone(pixels)
        return {
            "main": F.cross_entropy(self.heads["main"](z), self.labels[rows]),
            "hash": F.cross_entropy(self.heads["hash"](z), self.classes[rows]),
            "noise": F.mse_loss(self.heads["noise"](z), self.numbers[rows]),
            "corner": F.mse_loss(self.heads["corner"](z)[:, 0], pixels[:, :16].sum(1)),
        }

    def errors(self) -> dict[str, float]:
        """Return the cross entropy and the error of the main task, and the squared error of the brightness."""
        pixels, labels = self.pixels[self.first_test :], self.labels[self.first_test :]
        z = self.backbone(pixels)
        logits = self.heads["main"](z)
        return {
            "main CE": F.cross_entropy(logits, labels).item(),
            "main %": 100 * (logits.argmax(1) != labels).float().mean().item(),
            "corner": F.mse_loss(self.heads["corner"](z)[:, 0], pixels[:, :16].sum(1)).item(),
        }


class FineTuning(OnDigits):
    """A convolutional network with a large head, pretrained on digits, gets a small head: which way up is an image?"""

    about = "a pretrained network gets a second task; SGD"
    metrics = ("digit", "up", "digit %", "up %")
    lr = 3e-2
    num_steps = 300
    one_representation = False
    num_training, num_new = 1000, 300
    num_pretraining = 250

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.images = self.images[:, None]
        self.backbone = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 48)),
        )
        self.heads = nn.ModuleDict({"digit": head(48, 128, 64, 10), "up": head(48, 4)})
        self.model = nn.ModuleList([self.backbone, self.heads])
        self._pretrain()

    def _pretrain(self) -> None:
        adam = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        for _ in range(self.num_pretraining):
            rows = self.randint(self.num_training, 64)
            adam.zero_grad()
            loss = F.cross_entropy(self.heads["digit"](self.backbone(self.images[rows])), self.labels[rows])
            torch.autograd.backward(loss)
            adam.step()
        adam.zero_grad()

    def optimizer(self) -> Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.model.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)

    @staticmethod
    def _turned(images: Tensor, turns: Tensor) -> Tensor:
        return torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(images, turns, strict=True)])

    def losses(self) -> Losses:
        """Return the cross entropies of the old task, and of the new one on its 300 images."""
        old, new, turns = self.randint(self.num_training, 32), self.randint(self.num_new, 32), self.randint(4, 32)
        z = self.backbone(torch.cat([self.images[old], self._turned(self.images[new], turns)]))
        return {
            "digit": F.cross_entropy(self.heads["digit"](z[:32]), self.labels[old]),
            "up": F.cross_entropy(self.heads["up"](z[32:]), turns),
        }

    def errors(self) -> dict[str, float]:
        """Return the cross entropies and the errors in percent."""
        images, labels = self.images[self.num_training :], self.labels[self.num_training :]
        turns = torch.arange(len(images)) % 4
        digit = self.heads["digit"](self.backbone(images))
        up = self.heads["up"](self.backbone(self._turned(images, turns)))
        return {
            "digit": F.cross_entropy(digit, labels).item(),
            "up": F.cross_entropy(up, turns).item(),
            "digit %": 100 * (digit.argmax(1) != labels).float().mean().item(),
            "up %": 100 * (up.argmax(1) != turns).float().mean().item(),
        }
