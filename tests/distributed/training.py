"""One training run, on one process with the whole batch or on several with a part each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchjd.aggregation import UPGrad

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer

K, INPUTS, FEATURES = 3, 5, 8
STEPS = 35

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "as it ships": lambda: {"turn_every": None},
    "EqualWeighting, as it ships": lambda: {"weighting": EqualWeighting(), "turn_every": None},
    "GradNorm, mean of norms": lambda: {"weighting": GradNorm(common_norm="mean_of_norms"), "turn_every": None},
    "EqualWeighting": lambda: {"weighting": EqualWeighting()},
    "GradNorm": lambda: {"weighting": GradNorm(alpha=0.5)},
    "UPGrad": lambda: {"weighting": UPGrad()},
    "normalize_losses": lambda: {"normalize_losses": True},
    "Adam": lambda: {"rotation_optimizer": partial(torch.optim.Adam, lr=0.01)},
    "rotation_size": lambda: {"rotation_size": 5},
}


class Model(nn.Module):
    """A backbone and K heads; ``tasks`` are the heads to run."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(INPUTS, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 2)) for _ in range(K))

    def forward(self, x: Tensor, tasks: Sequence[int] = range(K)) -> tuple[list[Tensor], Tensor]:
        rep = self.backbone(x)
        return [self.heads[task](rep) for task in tasks], rep


@dataclass(frozen=True)
class Setup:
    """A model, and how to train it.

    Attributes:
        options: Key of ``OPTIONS``.
        wrapper: Option of DistributedDataParallel to enable; ``"fsdp"``: FSDP2 instead.
        sizes: Samples of each rank.
        absent: Task that is absent on the second rank, in every other step.
        micro_batches: Backward passes per step, all but the last without synchronization.
        scaled: Whether to scale the losses by a GradScaler that grows in every step.
    """

    options: str = "default"
    wrapper: str = ""
    sizes: tuple[int, int] = (4, 4)
    absent: int | None = None
    micro_batches: int = 1
    scaled: bool = False
    dtype: torch.dtype = torch.float32


Result = tuple[list[Tensor], Tensor, Tensor]


def train(rank: int | None, setup: Setup, steps: int = STEPS) -> Result:
    """Return parameters, rotations and task weights after some steps.

    Args:
        rank: The rank whose samples to train on; ``None``: those of both, in one process.
        setup: The model, and how to train it.
        steps: Number of steps.
    """
    torch.manual_seed(0)
    model = Model().to(setup.dtype)
    wrapped: Any = model
    if rank is not None and setup.wrapper == "fsdp":
        for module in (model.backbone, *model.heads):
            fully_shard(module)
        wrapped = fully_shard(model)
    elif rank is not None:
        options: dict[str, Any] = {setup.wrapper: True} if setup.wrapper else {}
        wrapped = DistributedDataParallel(model, **options)
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = RotoGradOptimizer(
        bare, heads=model.heads, burn_in_period=5, rotation_lr=0.05, **{"turn_every": 1, **OPTIONS[setup.options]()}
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1, enabled=setup.scaled)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        for micro_batch in range(setup.micro_batches):
            last = micro_batch == setup.micro_batches - 1
            synchronize: AbstractContextManager[Any] = nullcontext() if last or rank is None else wrapped.no_sync()
            batches = [_draw(size, generator, setup.dtype) for size in setup.sizes]
            absent = setup.absent if step % 2 else None
            with synchronize:
                losses, rep = _losses(wrapped, batches, rank, absent)
                optimizer.backward(losses, rep, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    parameters = [param.full_tensor() if isinstance(param, DTensor) else param for param in model.parameters()]
    return [param.detach() for param in parameters], optimizer.rotations.matrices, optimizer.task_weights


def _draw(size: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(size, INPUTS, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randn(K, size, 2, generator=generator, dtype=torch.float64).to(dtype)


def _losses(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], rank: int | None, absent: int | None
) -> tuple[list[Tensor | None], Tensor]:
    """Return the losses of one rank, or of the joined batch: the mean over the ranks, zero where a task is absent."""
    if rank is not None:
        tasks = [task for task in range(K) if not (rank == 1 and task == absent)]
        x, targets = batches[rank]
        outputs, rep = model(x, tasks)
        losses: list[Tensor | None] = [None] * K
        for task, output in zip(tasks, outputs, strict=True):
            losses[task] = (output - targets[task]).square().mean() * 0.1**task
        return losses, rep
    outputs, rep = model(torch.cat([x for x, _ in batches]))
    joined: list[Tensor | None] = []
    for task, output in enumerate(outputs):
        errors = torch.split(output, [len(x) for x, _ in batches])
        means = [(error - targets[task]).square().mean() for error, (_, targets) in zip(errors, batches, strict=True)]
        joined.append(torch.stack(means[: 1 if task == absent else 2]).sum() / 2 * 0.1**task)
    return joined, rep
