"""The digit-pair problem: two overlapping digits on one small canvas, and five tasks about them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

CANVAS = 12  # the two 8 x 8 digits share the 4 x 4 pixels in the middle
BATCH = 128
TEST_PAIRS = 2_000
TEST_DIGITS = 597  # of 1,797 digit images; only test pairs use these


@dataclass(frozen=True)
class Task:
    """One task: the size of its output, its loss, and its metric."""

    name: str
    unit: str
    num_outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool


def class_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Percentage of samples whose largest logit is the right one."""
    return 100 * (logits.argmax(dim=1) == target).float().mean()


def binary_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Percentage of samples whose logit has the right sign."""
    return 100 * ((logits > 0) == (target > 0.5)).float().mean()


def scaled_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in units of 1e-4, for a target between 0 and 1."""
    return 1e4 * F.mse_loss(prediction, target)


TASKS = [
    Task("left digit", "% correct", 10, F.cross_entropy, class_accuracy, True),
    Task("right digit", "% correct", 10, F.cross_entropy, class_accuracy, True),
    Task(
        "parity of product",
        "% correct",
        1,
        F.binary_cross_entropy_with_logits,
        binary_accuracy,
        True,
    ),
    Task("sum of digits", "MSE", 1, F.mse_loss, F.mse_loss, False),
    Task("active pixels", "MSE / 1e-4", 1, F.mse_loss, scaled_mse, False),
]


@dataclass(frozen=True)
class Pairs:
    """Canvases with two digits each, and the targets of all tasks."""

    images: Tensor  # (N, 1, 12, 12), from 0 to 1
    targets: dict[str, Tensor]  # by task name: classes (N,), everything else (N, 1)

    @property
    def num_batches(self) -> int:
        """Number of batches in an epoch."""
        return -(-len(self.images) // BATCH)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Shuffle by the number of the epoch alone, so that every method sees the same batches."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch))
        for rows in torch.split(order, BATCH):
            yield self.images[rows], {name: t[rows] for name, t in self.targets.items()}


def load_pairs(num_pairs: int, seed: int) -> tuple[Pairs, Pairs]:
    """Draw training and test pairs from two disjoint sets of digit images."""
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    test, train = torch.randperm(len(labels), generator=generator).tensor_split([TEST_DIGITS])
    return (
        _draw_pairs(images[train], labels[train], num_pairs, generator),
        _draw_pairs(images[test], labels[test], TEST_PAIRS, generator),
    )


def _draw_pairs(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Pairs:
    left, right = torch.randint(len(labels), (2, count), generator=generator)
    canvas = torch.zeros(2, count, 1, CANVAS, CANVAS)
    canvas[0, :, 0, :8, :8] = images[left]
    canvas[1, :, 0, -8:, -8:] = images[right]
    overlaid = canvas.amax(dim=0)  # (N, 1, 12, 12)
    targets = {
        "left digit": labels[left],
        "right digit": labels[right],
        "parity of product": (labels[left] * labels[right] % 2).float().unsqueeze(1),
        "sum of digits": (labels[left] + labels[right]).float().unsqueeze(1),
        "active pixels": (overlaid > 0.5).float().mean(dim=(1, 2, 3)).unsqueeze(1),
    }
    return Pairs(overlaid, targets)
