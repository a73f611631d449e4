"""Loggers: the measurements of a step as a flat dict of numbers, and written to TensorBoard."""

from __future__ import annotations

import math
from typing import Any, Protocol

from rotoopt.diagnostics._measurements import Measured, columns, latest, stack


class Writer(Protocol):
    """The interface of a writer for :func:`log_step`, such as TensorBoard's ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any:
        """Write one number."""


def scalars(optimizer: Measured) -> dict[str, float]:
    """Return the measurements of the latest step as a flat dict, for any logger: ``wandb.log(scalars(optimizer))``.

    Reading the numbers synchronizes with the GPU: with a fast network, call it every few steps.

    Args:
        optimizer: The optimizer, or a module such as :class:`~rotoopt.rotograd.RotoGrad`.

    Returns:
        For every task ``loss/<task>``, ``grad_norm/<task>``, ``weight/<task>``, ``alignment/<task>``, ``angle/<task>``,
        ``total_angle/<task>`` and ``present/<task>``; for every pair ``cosine/<task>/<task>``; ``conflict_rate``,
        ``rotation_lr`` and ``finite``. Values that were not measured, as for an absent task, are left out.

    Raises:
        TypeError: If ``optimizer`` is neither.
        RuntimeError: If it has not run a backward pass yet.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rotoopt import RotoGradOptimizer
        >>> backbone, heads = nn.Linear(3, 8), nn.ModuleDict({"left": nn.Linear(8, 1), "right": nn.Linear(8, 2)})
        >>> model = nn.Sequential(backbone, *heads.values())
        >>> optimizer = RotoGradOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), heads=heads)
        >>> z = backbone(torch.randn(5, 3))
        >>> optimizer.step([head(z).square().mean() for head in heads.values()], z)
        >>> sorted(scalars(optimizer))[:5]
        ['alignment/left', 'alignment/right', 'angle/left', 'angle/right', 'conflict_rate']
    """
    table = columns(stack([latest(optimizer)]), optimizer.task_names)
    numbers = {name: column.item() for name, column in table.items()}
    return {name: float(number) for name, number in numbers.items() if not math.isnan(number)}


def log_step(writer: Writer, optimizer: Measured, step: int | None = None) -> None:
    """Write :func:`scalars` of the latest step to TensorBoard.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or any object with its ``add_scalar``.
        optimizer: The optimizer, or a module such as :class:`~rotoopt.rotograd.RotoGrad`.
        step: The step to write it at. Default: the step of the record, which continues after a resume.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rotoopt import RotoGradOptimizer
        >>> class Print:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         if tag == "conflict_rate":
        ...             print(f"step {global_step}: {tag} {scalar_value}")
        >>> backbone, heads = nn.Linear(3, 8), [nn.Linear(8, 1), nn.Linear(8, 1)]
        >>> model = nn.Sequential(backbone, *heads)
        >>> optimizer = RotoGradOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), heads=heads)
        >>> z = backbone(torch.randn(5, 3))
        >>> optimizer.step([(heads[0](z) - 9).square().mean(), heads[1](z).square().mean()], z)
        >>> log_step(Print(), optimizer)
        step 0: conflict_rate ...
    """
    numbers = scalars(optimizer)
    step = optimizer.last_step.step if step is None and optimizer.last_step is not None else step
    for tag, number in numbers.items():
        writer.add_scalar(tag, number, step)
