"""A convolutional encoder with two dense-prediction heads, on generated images: rotations of the channels, `dim=1`.

Each image shows squares and discs at different distances. One head predicts the class of each pixel, the other its
depth. Depth is in centimeters, so its loss is about a thousand times the other one and dominates the plain sum.

    python examples/dense_prediction.py

Takes half a minute on two CPU cores, and prints the recall of the classes (33.3 is chance) and the depth error on a
test set. The plain sum does not learn the classes. RotoGrad learns both, with a larger depth error.
Output: docs/examples.md.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotoopt import RotoGradOptimizer

SIZE, CHANNELS, CLASSES = 24, 16, 3  # classes: background, square, disc


class Network(nn.Module):
    """An encoder of maps (B, C, H, W), and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        )
        self.segmentation = nn.Sequential(nn.ReLU(), nn.Conv2d(CHANNELS, CLASSES, 1))
        self.depth = nn.Sequential(nn.ReLU(), nn.Conv2d(CHANNELS, 1, 1))


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images (N, 1, H, W), classes (N, H, W) and depths in centimeters (N, 1, H, W)."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    classes = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    depth = torch.full((count, SIZE, SIZE), 100.0)
    for distance in (80.0, 50.0, 20.0):  # from far to near
        center = torch.randint(3, SIZE - 3, (2, count, 1, 1), generator=generator)
        radius = torch.randint(2, 6, (count, 1, 1), generator=generator)
        kind = torch.randint(1, CLASSES, (count, 1, 1), generator=generator)
        dy, dx = (y - center[0]).abs(), (x - center[1]).abs()
        square, disc = torch.maximum(dy, dx) <= radius, dy.square() + dx.square() <= radius.square()
        inside = torch.where(kind == 1, square, disc)
        classes = torch.where(inside, kind, classes)
        depth = torch.where(inside, distance + 10 * torch.rand(count, 1, 1, generator=generator), depth)
    stripes = 0.3 * (-1.0) ** torch.where(classes == 1, x, y) * (classes > 0)  # squares and discs differ in texture
    noise = 0.2 * torch.randn(count, SIZE, SIZE, generator=generator)
    images = 1 - depth / 100 + stripes + noise
    return images.unsqueeze(1), classes, depth.unsqueeze(1)


def train(epochs: int, *, rotograd: bool) -> tuple[float, float]:
    """Train, and return the mean recall of the classes in percent and the depth error in centimeters."""
    generator = torch.Generator().manual_seed(0)
    training, (images, classes, depth) = draw(1024, generator), draw(256, generator)
    torch.manual_seed(0)
    network = Network()
    optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    if rotograd:
        optimizer = RotoGradOptimizer(optimizer, heads=[network.segmentation, network.depth], dim=1)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(training[0]), generator=generator), 32):
            x, y_classes, y_depth = (tensor[rows] for tensor in training)
            z = network.encoder(x)
            losses = [F.cross_entropy(network.segmentation(z), y_classes), F.mse_loss(network.depth(z), y_depth)]
            optimizer.zero_grad()
            if isinstance(optimizer, RotoGradOptimizer):
                optimizer.step(losses, z)
            else:
                torch.autograd.backward(losses)
                optimizer.step()
        scheduler.step()
    network.eval()
    with torch.no_grad():
        z = network.encoder(images)
        right = network.segmentation(z).argmax(1) == classes
        recall = torch.stack([right[classes == each].float().mean() for each in range(CLASSES)]).mean()
        error = F.l1_loss(network.depth(z), depth)
    return 100 * float(recall), float(error)


def main() -> None:
    """Train with the plain sum and with RotoGrad, and print the test metrics."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    print("                 recall of the classes    depth error, cm")
    for name, rotograd in (("plain sum", False), ("RotoGrad", True)):
        recall, error = train(args.epochs, rotograd=rotograd)
        print(f"{name:<16}{recall:22.1f} {error:18.2f}", flush=True)


if __name__ == "__main__":
    main()
