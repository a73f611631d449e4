"""Dense prediction: three maps of small images with shapes; the channels of the representation are rotated."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.problems.base import Metric, Outputs, Problem, Trial

SIZE, CHANNELS = 16, 16
NUM_KINDS = 3  # square, disc, cross
NUM_TRAINING, NUM_TEST, BATCH = 512, 256, 16
NUM_EPOCHS = 8


def draw_scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw images of up to three shapes that may occlude each other; squares and discs have stripes.

    Returns:
        Images ``(N, 1, H, W)``, classes ``(N, H, W)`` with 0 for the background, depth ``(N, 1, H, W)``, and
        edges ``(N, 1, H, W)``, one where the class or the shape changes.
    """
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    classes = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    depth = (1 - 0.3 * y / SIZE).expand(count, SIZE, SIZE).clone()  # the depth of the floor decreases
    shape = torch.zeros_like(classes)
    for index in range(1, 4):  # from far to near
        center = torch.randint(2, SIZE - 2, (2, count, 1, 1), generator=generator)
        radius = torch.randint(2, 5, (count, 1, 1), generator=generator)
        kind = torch.randint(NUM_KINDS, (count, 1, 1), generator=generator)
        dy, dx = (y - center[0]).abs(), (x - center[1]).abs()
        square = torch.maximum(dy, dx) <= radius
        disc = dy.square() + dx.square() <= radius.square()
        cross = (torch.minimum(dy, dx) <= radius // 3) & square
        inside = torch.where(kind == 0, square, torch.where(kind == 1, disc, cross))
        distance = 0.7 - 0.2 * index + 0.1 * torch.rand(count, 1, 1, generator=generator)
        classes = torch.where(inside, kind + 1, classes)
        depth = torch.where(inside, distance, depth)
        shape = torch.where(inside, index, shape)
    padded = F.pad(shape.float(), (0, 1, 0, 1), mode="replicate")
    edges = (padded[:, 1:, :-1] != shape) | (padded[:, :-1, 1:] != shape)
    light = 0.7 + 0.3 * torch.rand(count, 1, 1, generator=generator)  # so that brightness alone is not the depth
    stripes = torch.stack([torch.zeros_like(x), (-1) ** x, (-1) ** y, torch.zeros_like(x)]).float()
    texture = 0.2 * stripes[classes, y, x]
    images = light * (1.2 - depth) + texture + 0.1 * torch.randn(count, SIZE, SIZE, generator=generator)
    return images.unsqueeze(1), classes, depth.unsqueeze(1), edges.unsqueeze(1).float()


class MapTrial(Trial):
    """A convolutional encoder, and one head per map. The learning rate of the network decays to 0."""

    num_steps = NUM_EPOCHS * (NUM_TRAINING // BATCH)
    d = CHANNELS
    dim = 1
    post_shape = (SIZE, SIZE)
    lr = 3e-3
    decays = True

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.train = draw_scenes(NUM_TRAINING, generator)
        self.held_out = draw_scenes(NUM_TEST, generator)
        self.generator = generator
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(
            nn.Conv2d(1, CHANNELS, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, kernel_size=3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, kernel_size=3, padding=1),
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(CHANNELS, outputs, kernel_size=1)) for outputs in (1 + NUM_KINDS, 1, 1)
        )

    def batches(self) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Iterate over the images several times."""
        for _ in range(NUM_EPOCHS):
            order = torch.randperm(NUM_TRAINING, generator=self.generator)
            for rows in torch.split(order, BATCH):
                images, *maps = (tensor[rows] for tensor in self.train)
                yield images, tuple(maps)

    def losses(self, outputs: list[Tensor], targets: tuple[Tensor, ...]) -> list[Tensor]:
        """Return cross entropy, squared error of the depth, and binary cross entropy of the edges."""
        return [
            F.cross_entropy(outputs[0], targets[0]),
            F.mse_loss(outputs[1], targets[1]),
            F.binary_cross_entropy_with_logits(outputs[2], targets[2]),
        ]

    @torch.no_grad()
    def test(self, outputs: Outputs) -> list[float]:
        """Return the mean recall of the classes, the root mean square error of the depth, and the loss of the edges."""
        images, *maps = self.held_out
        made = outputs(images)
        _, squared_error, edges = self.losses(made, tuple(maps))
        right = made[0].argmax(1) == maps[0]
        recalls = [right[maps[0] == kind].float().mean() for kind in range(1 + NUM_KINDS)]
        return [100 * torch.stack(recalls).mean().item(), squared_error.sqrt().item(), edges.item()]


MAPS = Problem(
    "maps",
    (Metric("classes, % recall", True), Metric("depth, RMSE", False), Metric("edges, BCE", False)),
    MapTrial,
    middle_lr=2.0,
)
