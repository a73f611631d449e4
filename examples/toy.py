"""The toy problem of the RotoGrad paper: one point, and two tasks with minima in opposite corners of the plane.

Each task has one global minimum (loss -6) and many local ones. Without rotations, no point is near both global minima.
With rotations, each task sees the point in its own rotated plane, and one point can be optimal for both tasks.

    python examples/toy.py

Takes less than a minute on one CPU core. It prints the final losses, mean over 10 starts, and saves toy.png: the paths
of the point in the space of each task. With both methods, some starts end in local minima. Output: docs/examples.md.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from rotoopt import EqualWeighting, RotoGradOptimizer

CORNERS = (1.5, -1.5)  # both coordinates of the minimum of each task
REACH = 4.0  # limits of the picture


def loss_of(point: Tensor, corner: float) -> Tensor:
    """Return |u| - sin(3 u) / u, summed over both coordinates of the distance u to the corner."""
    u = point - corner
    return (u.abs() - 3 * torch.sinc(3 * u / math.pi)).sum(dim=-1)


def train(seed: int, steps: int, *, rotate: bool) -> tuple[list[Tensor], Tensor]:
    """Return the path of the point in the space of each task, ``(steps, 2)`` each, and the final losses."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2))
    sgd = torch.optim.SGD(network.parameters(), lr=1e-3)
    optimizer = RotoGradOptimizer(
        sgd,
        num_tasks=2,
        rotate=rotate,
        weighting=None if rotate else EqualWeighting(),
        rotation_lr=0.6,
        normalize_losses=rotate,
    )
    paths: list[list[Tensor]] = [[], []]
    for _ in range(steps):
        z = network(torch.zeros(1, 2))
        points = optimizer.rotate(z)
        losses = [loss_of(point, corner).mean() for point, corner in zip(points, CORNERS, strict=True)]
        optimizer.zero_grad()
        optimizer.step(losses, z)
        for path, point in zip(paths, points, strict=True):
            path.append(point[0].detach())
    return [torch.stack(path) for path in paths], torch.stack(losses).detach()


def draw(paths: dict[str, list[list[Tensor]]], path: Path) -> None:
    """Save a picture: one row per method, one column per task, the paths of all starts."""
    ticks = torch.linspace(-REACH, REACH, 200)
    plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)
    figure, axes = plt.subplots(len(paths), 2, figsize=(8, 8.4), sharex=True, sharey=True, layout="constrained")
    for row, (method, starts) in zip(axes, paths.items(), strict=True):
        for task, (axis, corner) in enumerate(zip(row, CORNERS, strict=True)):
            axis.contourf(ticks, ticks, loss_of(plane, corner), levels=18, cmap="Blues_r")
            axis.plot(corner, corner, "*", color="white", markersize=14, markeredgecolor="black")
            for points in (both[task] for both in starts):
                axis.plot(points[:, 0], points[:, 1], color="#e66101", linewidth=1.2, alpha=0.9)
                axis.plot(*points[-1], "o", color="black", markersize=6)
            axis.set_aspect("equal")
            axis.set_title(f"{method}, space of task {task + 1}", fontsize=11)
            axis.set(xlabel=f"$r_{{{task + 1},1}}$", ylabel=f"$r_{{{task + 1},2}}$")
    figure.suptitle("Paths from all starts, final points (dots), contours of the losses, minima (stars)", fontsize=11)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train from several starts, print the losses and draw the paths."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path("toy.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    print("             task 1    task 2")
    paths: dict[str, list[list[Tensor]]] = {}
    for method, rotate in (("plain sum", False), ("RotoGrad", True)):
        runs = [train(seed, args.steps, rotate=rotate) for seed in range(args.seeds)]
        paths[method] = [both for both, _ in runs]
        first, second = torch.stack([losses for _, losses in runs]).mean(dim=0).tolist()
        print(f"{method:<10}{first:9.2f} {second:9.2f}")
    draw(paths, args.out)


if __name__ == "__main__":
    main()
