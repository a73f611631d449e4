"""Gradients of a batch that several processes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotoopt._torch.processes import Processes
from rotoopt.weighting._gradients import TaskGradients


@dataclass(frozen=True)
class JoinedGradients(TaskGradients):
    """The gradients of the joined batch: ``scaled`` has the samples of this process, all else is that of all.

    Attributes:
        processes: The processes that share the batch.
    """

    processes: Processes

    @classmethod
    def join(cls, own: TaskGradients, processes: Processes) -> JoinedGradients:
        """Join the gradients of all processes, by exchanging K (K + 2) numbers."""
        K = len(own.scale)
        told = processes.gather(torch.cat([own.gram.flatten(), own.scale, own.present.to(own.scale)]))
        grams, scales, present = torch.split(told, [K * K, K, K], dim=1)
        grams = grams.view(-1, K, K)
        # Where a process has no gradient of a task, its scale means nothing.
        zero = grams.diagonal(dim1=1, dim2=2) == 0
        scale = torch.where(zero, 0.0, scales).amax(0)
        scale = torch.where(scale > 0, scale, 1.0)
        ratios = torch.where(zero, 0.0, scales / scale)
        gram = (ratios[:, :, None] * grams * ratios[:, None, :]).sum(0)
        return cls(own.scaled.mul_((own.scale / scale)[:, None]), scale, None, present.any(0), gram, processes)

    def aggregate(self, aggregator: Callable[[Tensor], Tensor]) -> Tensor:
        """Let every process see the gradients of all samples, and keep its own part; waits for the device."""
        own = self.rows()
        sizes = [int(size) for size in self.processes.gather(torch.tensor([own.shape[1]], device=own.device))]
        padded = torch.nn.functional.pad(own, (0, max(sizes) - own.shape[1]))
        gathered = self.processes.gather(padded)
        joined = torch.cat([rows[:, :size] for rows, size in zip(gathered, sizes, strict=True)], dim=1)
        start = sum(sizes[: self.processes.rank])
        return aggregator(joined)[start : start + own.shape[1]]
