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

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer, RotoGradWeighting

K, INPUTS, FEATURES = 3, 5, 8
STEPS = 35

Tasks = Sequence[int]
ALL = range(K)
# By step, the tasks of both ranks in each backward pass.
PLANS: dict[str, Callable[[int], list[tuple[Tasks, Tasks]]]] = {
    "all": lambda step: [(ALL, ALL)],
    "one absent on a rank": lambda step: [(ALL, [0, 2] if step % 2 else ALL)],
    "one absent on each rank in turn": lambda step: [([0, 2], ALL) if step % 2 else (ALL, [1, 2])],
    "one absent on both": lambda step: [([1, 2], [1, 2]) if step % 3 else (ALL, ALL)],
    "one left on a rank": lambda step: [(ALL, [0])],
    "another one on each rank": lambda step: [([step % K], [(step + 1) % K])],
    "one per step": lambda step: [([step // 2 % K], [step // 2 % K])],
    "one per pass": lambda step: [([task], [task]) for task in ALL if (step + task) % 4],
    "another one per pass on each rank": lambda step: [([task], [K - 1 - task]) for task in ALL],
    "others in each pass": lambda step: [(ALL, [1, 2]), ([0], ALL)],
    "accumulation": lambda step: [(ALL, ALL), (ALL, ALL)],
}
ALONE = {name for name in PLANS if "another" in name or "per" in name}  # rotations have nothing to align
WRAPPERS: dict[str, dict[str, Any]] = {
    "": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "a bucket for each parameter": {"find_unused_parameters": True, "bucket_cap_mb": 1e-6},
}
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "as it ships": lambda: {"turn_every": None},
    "EqualWeighting, as it ships": lambda: {"weighting": EqualWeighting(), "turn_every": None},
    "GradNorm, mean of norms": lambda: {"weighting": GradNorm(common_norm="mean_of_norms"), "turn_every": None},
    "every second step": lambda: {"turn_every": 2},
    "RotoGradWeighting": lambda: {"weighting": RotoGradWeighting()},
    "rotate=False": lambda: {"rotate": False},
    "EqualWeighting": lambda: {"weighting": EqualWeighting()},
    "GradNorm": lambda: {"weighting": GradNorm(alpha=0.5)},
    "UPGrad": lambda: {"weighting": UPGrad()},
    "normalize_losses": lambda: {"normalize_losses": True},
    "Adam": lambda: {"rotation_optimizer": partial(torch.optim.Adam, lr=0.01)},
    "rotation_size": lambda: {"rotation_size": 5},
}


class Model(nn.Module):
    """A backbone and K heads; ``tasks`` are the heads to run. If ``deep``, the last one reads another tensor."""

    def __init__(self, deep: bool = False) -> None:
        super().__init__()
        self.deep = nn.Linear(FEATURES, FEATURES) if deep else None
        self.backbone = nn.Sequential(nn.Linear(INPUTS, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 2)) for _ in range(K))

    def forward(self, x: Tensor, tasks: Tasks = ALL) -> tuple[list[Tensor], Tensor]:
        rep = self.backbone(x)
        last = rep if self.deep is None else self.deep(rep.tanh())
        return [self.heads[task](last if task == K - 1 else rep) for task in tasks], rep


@dataclass(frozen=True)
class Setup:
    """A model, and how to train it.

    Attributes:
        options: Key of ``OPTIONS``.
        wrapper: Key of ``WRAPPERS``, the options of DistributedDataParallel; ``"fsdp"``: FSDP2 instead.
        sizes: Samples of each rank.
        plan: Key of ``PLANS``. All backward passes of a step but the last are without synchronization.
        own: Whether to call ``sum(losses).backward()``.
        deep: Whether one of the heads reads another tensor.
        scaled: Whether to scale the losses by a GradScaler that grows in every step.
    """

    options: str = "default"
    wrapper: str = ""
    sizes: tuple[int, int] = (4, 4)
    plan: str = "all"
    own: bool = False
    deep: bool = False
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
    model = Model(setup.deep).to(setup.dtype)
    wrapped: Any = model
    if rank is not None and setup.wrapper == "fsdp":
        for module in (model.backbone, *model.heads, *([model.deep] if model.deep else [])):
            fully_shard(module)
        wrapped = fully_shard(model)
    elif rank is not None:
        wrapped = DistributedDataParallel(model, **WRAPPERS[setup.wrapper])
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = RotoGradOptimizer(
        bare, heads=model.heads, burn_in_period=5, rotation_lr=0.05, **{"turn_every": 1, **OPTIONS[setup.options]()}
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1, enabled=setup.scaled)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        passes = PLANS[setup.plan](step)
        for number, tasks in enumerate(passes):
            waits = number < len(passes) - 1 and rank is not None
            synchronize: AbstractContextManager[Any] = wrapped.no_sync() if waits else nullcontext()
            batches = [_draw(size, generator, setup.dtype) for size in setup.sizes]
            with synchronize:
                losses, rep = _losses(wrapped, batches, rank, tasks)
                if setup.own:
                    torch.stack([loss for loss in losses if loss is not None]).sum().backward()  # type: ignore[no-untyped-call]
                else:
                    optimizer.backward(losses, rep, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    parameters = [param.full_tensor() if isinstance(param, DTensor) else param for param in model.parameters()]
    return [param.detach() for param in parameters], optimizer.rotations.matrices, optimizer.task_weights


def _draw(size: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(size, INPUTS, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randn(K, size, 2, generator=generator, dtype=torch.float64).to(dtype)


def _losses(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], rank: int | None, tasks: tuple[Tasks, Tasks]
) -> tuple[list[Tensor | None], Tensor]:
    """Return the losses of one rank, or of the joined batch: the mean over the ranks, zero where a task is absent."""
    losses: list[Tensor | None] = [None] * K
    if rank is not None:
        x, targets = batches[rank]
        outputs, rep = model(x, tasks[rank])
        for task, output in zip(tasks[rank], outputs, strict=True):
            losses[task] = (output - targets[task]).square().mean() * 0.1**task
        return losses, rep
    joined = sorted({*tasks[0], *tasks[1]})
    outputs, rep = model(torch.cat([x for x, _ in batches]), joined)
    for task, output in zip(joined, outputs, strict=True):
        errors = torch.split(output, [len(x) for x, _ in batches])
        means = [(error - targets[task]).square().mean() for error, (_, targets) in zip(errors, batches, strict=True)]
        present = [mean for mean, own in zip(means, tasks, strict=True) if task in own]
        losses[task] = torch.stack(present).sum() / len(tasks) * 0.1**task
    return losses, rep
