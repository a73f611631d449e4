"""Five tasks on pairs of overlapping digits: one network per task, the plain sum, and RotoGrad.

The initial losses range from 0.1 (share of active pixels) to 100 (sum of the digits). In the plain sum, the largest
loss dominates the backbone, and the digits are learned slowly and poorly. RotoGrad weights the gradients at the
representation by the progress of the tasks instead of the scale of their losses. The loops `train_plain` and
`train_rotograd` below differ in the two lines with an arrow.

    python examples/digit_pairs.py                         # for a first look: --seeds 1 --epochs 5

Takes some 4 minutes on one CPU core. It prints a table and saves digit_pairs.png. With RotoGrad four tasks improve over
the plain sum. The sum of the digits, which dominates the plain sum, gets worse. Delta-m depends mostly on the active
pixels, whose error is so small that a small difference is a large relative change. Output: docs/examples.md.
"""

import argparse
import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from digit_pairs_data import TASKS, Pairs, Task, load_pairs
from digit_pairs_report import Result, print_table, save_picture
from rich.progress import Progress, TimeElapsedColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from rotoopt import RotoGradOptimizer


class DigitPairNet(nn.Module):
    """A small convolutional backbone, and one head for each task."""

    def __init__(self, tasks: list[Task]) -> None:
        super().__init__()
        self.tasks = tasks
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 3 * 3, 64),
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, task.num_outputs)) for task in tasks
        )

    def losses(self, rep: Tensor, targets: dict[str, Tensor]) -> list[Tensor]:
        """The loss of every task, in the order of the heads."""
        pairs = zip(self.tasks, self.heads, strict=True)
        return [task.loss(head(rep), targets[task.name]) for task, head in pairs]

    @torch.no_grad()
    def metrics(self, test: Pairs) -> Tensor:
        """The test metric of every task, shape ``(K,)``."""
        rep = self.backbone(test.images)
        pairs = zip(self.tasks, self.heads, strict=True)
        return torch.stack([task.metric(head(rep), test.targets[task.name]) for task, head in pairs])

    def copy_for(self, tasks: list[Task]) -> "DigitPairNet":
        """A network with the same weights, but only the heads of these tasks."""
        net = copy.deepcopy(self)
        net.tasks = tasks
        net.heads = nn.ModuleList(net.heads[self.tasks.index(task)] for task in tasks)
        return net


def train_plain(net: DigitPairNet, train: Pairs, num_epochs: int) -> Iterator[None]:
    """Train on the sum of the losses; yield after every epoch."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    scheduler = CosineAnnealingLR(optimizer, num_epochs)
    for epoch in range(num_epochs):
        for images, targets in train.batches(epoch):
            rep = net.backbone(images)
            losses = net.losses(rep, targets)
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        scheduler.step()
        yield


def train_rotograd(net: DigitPairNet, train: Pairs, num_epochs: int) -> Iterator[Tensor]:
    """Train with RotoGrad: the same loop except for the two lines with an arrow.

    Yields, after every epoch and for the picture only, the epoch's mean of the cosines ``(K, K)``
    between the task gradients at the representation.
    """
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    optimizer = RotoGradOptimizer(adam, heads=net.heads)  # <- wraps the optimizer
    scheduler = CosineAnnealingLR(optimizer, num_epochs)
    for epoch in range(num_epochs):
        cosines = []
        for images, targets in train.batches(epoch):
            rep = net.backbone(images)
            losses = net.losses(rep, targets)
            optimizer.zero_grad()
            optimizer.step(losses, rep)  # <- in place of the sum, backward() and step()
            if optimizer.last_step is not None:
                cosines.append(optimizer.last_step.cosines)
        scheduler.step()
        yield torch.stack(cosines).mean(dim=0)


# How each method trains, and which tasks share a network. The first is the baseline.
METHODS: dict[str, tuple[Callable[..., Iterator[Tensor | None]], list[list[Task]]]] = {
    "one network per task": (train_plain, [[task] for task in TASKS]),
    "plain sum": (train_plain, [TASKS]),
    "RotoGrad": (train_rotograd, [TASKS]),
}


def run(method: str, seed: int, num_pairs: int, num_epochs: int, advance: Callable[[], None]) -> Result:
    """Train with one method and one seed, and test after every epoch."""
    train, test = load_pairs(num_pairs, seed)
    torch.manual_seed(seed)
    initial = DigitPairNet(TASKS)  # the same for all methods
    curves, cosines, seconds_per_epoch = [], [], 0.0
    trainer, task_groups = METHODS[method]
    for tasks in task_groups:
        net = initial.copy_for(tasks)
        curve, seconds = [], []
        start = time.perf_counter()
        for epoch_cosines in trainer(net, train, num_epochs):
            seconds.append(time.perf_counter() - start)
            curve.append(net.metrics(test))
            if epoch_cosines is not None:
                cosines.append(epoch_cosines)
            advance()
            start = time.perf_counter()  # excludes testing and the progress bar
        curves.append(torch.stack(curve))
        seconds_per_epoch += statistics.median(seconds)  # the first one warms up
    return Result(
        metrics=torch.cat(curves, dim=-1).unsqueeze(0),
        cosines=torch.stack(cosines).unsqueeze(0) if cosines else None,
        ms_per_step=torch.tensor([1000 * seconds_per_epoch / train.num_batches]),
    )


def main() -> None:
    """Compare RotoGrad with one network per task and with the plain sum of the losses."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (3)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the pairs (20)")
    parser.add_argument("--pairs", type=int, default=8960, help="number of training pairs (8960)")
    parser.add_argument("--out", type=Path, default="digit_pairs.png", help="where the picture goes")
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)  # fail now rather than after the training
    torch.set_num_threads(1)  # more threads do not help with tensors this small
    runs: dict[str, list[Result]] = {method: [] for method in METHODS}
    num_networks = sum(len(task_groups) for _, task_groups in METHODS.values())
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        bar = progress.add_task("", total=args.seeds * args.epochs * num_networks)
        for seed, method in itertools.product(range(args.seeds), METHODS):
            progress.update(bar, description=f"seed {seed}, {method}")
            advance = functools.partial(progress.advance, bar)
            runs[method].append(run(method, seed, args.pairs, args.epochs, advance))

    results = {method: Result.join(of_seeds) for method, of_seeds in runs.items()}
    print_table(results)
    save_picture(results, load_pairs(args.pairs, seed=0)[1], args.out)
    print(f"Learning curves and gradient cosines: {args.out}")


if __name__ == "__main__":
    main()
