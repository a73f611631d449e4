"""The toy problem of the RotoGrad paper: one point, two tasks that want it in opposite corners.

Each task has one global valley (loss -6) and many local ones. Without rotations both valleys lie in the same plane, far
apart, and no point is in both. With them, each task sees the plane turned its own way: the valleys can come together.
The picture shows the way of the point in the eyes of each task, with and without rotations.

    python examples/toy.py

Takes half a minute. It saves toy.png and prints the final losses, mean over 10 starts:

                 task 1    task 2
    plain sum     -1.85      1.48
    RotoGrad      -4.82     -4.31

Single starts differ much: with either method some end in local valleys.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from rotoopt import EqualWeighting, RotoGradOptimizer

CORNERS = (1.5, -1.5)  # where the tasks want both coordinates
REACH = 4.0  # of the picture


def loss_of(point: Tensor, corner: float) -> Tensor:
    """Return |u| - sin(3 u) / u, summed over both coordinates of the distance u to the corner."""
    u = point - corner
    return (u.abs() - 3 * torch.sinc(3 * u / math.pi)).sum(dim=-1)


def train(seed: int, steps: int, *, rotate: bool) -> tuple[list[Tensor], Tensor]:
    """Return the way of the point in the eyes of both tasks, each ``(steps, 2)``, and the final losses."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2))
    sgd = torch.optim.SGD(network.parameters(), lr=1e-3)
    optimizer = RotoGradOptimizer(
        sgd,
        num_tasks=2,
        rotate=rotate,
        weighting=None if rotate else EqualWeighting(),
        rotation_lr=0.3,
        normalize_losses=rotate,
    )
    ways: list[list[Tensor]] = [[], []]
    for _ in range(steps):
        z = network(torch.zeros(1, 2))
        points = optimizer.rotate(z)
        losses = [loss_of(point, corner).mean() for point, corner in zip(points, CORNERS, strict=True)]
        optimizer.zero_grad()
        optimizer.step(losses, z)
        for way, point in zip(ways, points, strict=True):
            way.append(point[0].detach())
    return [torch.stack(way) for way in ways], torch.stack(losses).detach()


def draw(ways: dict[str, list[list[Tensor]]], path: Path) -> None:
    """Save a picture: one row per method, one column per task, the ways of all starts."""
    ticks = torch.linspace(-REACH, REACH, 200)
    plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)
    figure, axes = plt.subplots(len(ways), 2, figsize=(8, 8.4), sharex=True, sharey=True, layout="constrained")
    for row, (method, starts) in zip(axes, ways.items(), strict=True):
        for task, (axis, corner) in enumerate(zip(row, CORNERS, strict=True)):
            axis.contourf(ticks, ticks, loss_of(plane, corner), levels=18, cmap="Blues_r")
            axis.plot(corner, corner, "*", color="white", markersize=14, markeredgecolor="black")
            for way in (both[task] for both in starts):
                axis.plot(way[:, 0], way[:, 1], color="#e66101", linewidth=1.2, alpha=0.9)
                axis.plot(*way[-1], "o", color="black", markersize=6)
            axis.set_aspect("equal")
            axis.set_title(f"{method}, space of task {task + 1}", fontsize=11)
            axis.set(xlabel=f"$r_{{{task + 1},1}}$", ylabel=f"$r_{{{task + 1},2}}$")
    figure.suptitle("Paths from all starts (dots: final points), losses (darker is lower), minima (stars)", fontsize=11)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train from several starts, print the losses and draw the ways."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path("toy.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    print("             task 1    task 2")
    ways: dict[str, list[list[Tensor]]] = {}
    for method, rotate in (("plain sum", False), ("RotoGrad", True)):
        runs = [train(seed, args.steps, rotate=rotate) for seed in range(args.seeds)]
        ways[method] = [way for way, _ in runs]
        first, second = torch.stack([losses for _, losses in runs]).mean(dim=0).tolist()
        print(f"{method:<10}{first:9.2f} {second:9.2f}")
    draw(ways, args.out)


if __name__ == "__main__":
    main()
