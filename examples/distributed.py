"""RotoGrad under DistributedDataParallel: N processes on parts of a batch train like one process on the whole batch.

    torchrun --nproc_per_node=2 examples/distributed.py
    python examples/distributed.py --batch 128             # the same training in one process

Takes about ten seconds on the CPU. With `--steps 200`, both commands print the same losses; after 1000 steps they
differ in the third or fourth digit, because rounding errors grow during training. Predicting the mean would give 3.5
and 346. Output: docs/examples.md.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the group exists: otherwise default arguments there keep it alive until the exit
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from rotoopt import RotoGradOptimizer

INPUTS, FEATURES = 16, 64


class Model(nn.Module):
    """Two regressions on one representation."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(INPUTS, 128), nn.ReLU(), nn.Linear(128, FEATURES))
        self.first = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, 1))
        self.second = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return both predictions and the representation."""
        z = self.backbone(x)
        return self.first(z), self.second(z), z


def batch_of_this_process(step: int, size: int, rank: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the batch of all processes, and return the samples of this one: inputs and targets of both tasks."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size * count, INPUTS, generator=generator)[rank * size : (rank + 1) * size]
    return x, x[:, :8].sin().sum(1, keepdim=True), 10 * x[:, 4:12].sin().sum(1, keepdim=True)


def main() -> None:
    """Train, and print the losses of the last batch."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64, help="samples per process")
    args = parser.parse_args()

    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = Model()
    model: nn.Module = network
    if count > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(network)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer = RotoGradOptimizer(adam, heads=[network.first, network.second], normalize_losses=True)
    for step in range(args.steps):
        x, y_first, y_second = batch_of_this_process(step, args.batch, rank, count)
        first, second, z = model(x)
        losses = [mse_loss(first, y_first), mse_loss(second, y_second)]
        optimizer.zero_grad()
        optimizer.step(losses, z)
    record = optimizer.last_step
    if rank == 0 and record is not None and record.losses is not None:  # those of the joined batch
        print("losses after training: " + ", ".join(f"{loss:.4f}" for loss in record.losses.tolist()))
    if count > 1:
        # Delete the model first: if it holds the last reference to the group, its destructor waits for the threads
        # of the group while it holds the GIL, and one of them may need the GIL: a rare deadlock on a busy machine.
        del model
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
