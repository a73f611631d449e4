"""Distributed training: operations that make N processes, each with part of the batch, equal one with all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rotoopt._torch.private import default_store

MAX_PASSES = 64  # of a step: the tasks of later ones count as those of the last
asked: Counter[str] = Counter()  # number of questions to these ranks


class Processes:
    """The processes that train one model on different data, as DistributedDataParallel and FSDP2 do.

    All processes call every method, in the same order, whatever their data. The results are bit-identical on all of
    them.

    Args:
        group: The process group. ``None``: the default group if it exists at that time, otherwise this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @property
    def count(self) -> int:
        """N, which is 1 outside of distributed training."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return dist.get_rank(self.group)

    def gather(self, local: Tensor) -> Tensor:
        """Return the tensors of all processes, which have the same shape. Shape ``(N, *local.shape)``."""
        gathered = [torch.empty_like(local) for _ in range(self.count)]
        dist.all_gather(gathered, local.contiguous(), group=self.group)
        return torch.stack(gathered)

    def sum_(self, tensor: Tensor) -> None:
        """Add the tensors of all processes, in place."""
        dist.all_reduce(tensor, group=self.group)

    def all(self, own: bool) -> bool:
        """Return whether ``own`` is true on all processes, without a collective.

        In the middle of a backward pass, processes with different tasks have begun different numbers of those of
        DistributedDataParallel, and each would wait for the other one.
        """
        ranks = str(dist.get_process_group_ranks(self.group or dist.group.WORLD))
        asked[ranks] += 1
        store, key = default_store(), f"rotoopt {ranks} {asked[ranks]}"
        store.add(f"{key} false", 1 - own)
        if store.add(f"{key} count", 1) == self.count:
            store.set(f"{key} done", "")
        store.wait([f"{key} done"])
        return bool(store.add(f"{key} false", 0) == 0)

    def tasks(self, own: Sequence[Set[int]], num_tasks: int, device: torch.device) -> list[set[int]]:
        """Return the tasks of each backward pass of a step on any process.

        Synchronizes with the device unless ``own`` has all tasks in all passes.

        Args:
            own: The tasks of each backward pass on this process.
            num_tasks: K.
            device: The device that the group exchanges tensors of.
        """
        present = torch.zeros(MAX_PASSES, num_tasks, dtype=torch.uint8)
        for i, tasks in enumerate(own):
            present[min(i, MAX_PASSES - 1), list(tasks)] = 1
        gathered = self.gather(present.to(device))
        if own and all(len(tasks) == num_tasks for tasks in own):
            return [set(tasks) for tasks in own]
        joint = [{task for task in range(num_tasks) if row[task]} for row in gathered.amax(0).tolist()]
        return joint + joint[-1:] * (len(own) - MAX_PASSES)

    def mean(self, losses: Tensor, present: Tensor) -> Tensor:
        """Return the mean losses of the tasks over all processes, NaN for a task that is absent on all.

        A task that is absent on some processes counts as zero there: DistributedDataParallel computes the gradient of
        this loss.

        Args:
            losses: L_k on this process. Shape ``(K,)``.
            present: Which tasks are present on this process. Shape ``(K,)``, bool.
        """
        values, counts = self.gather(torch.stack([torch.where(present, losses, 0.0), present.to(losses)])).sum(0)
        return torch.where(counts > 0, values / self.count, float("nan"))

    def shared_seed(self) -> int:
        """Return a random number from torch's global generator, that of the first process on all."""
        if self.count == 1:
            return int(torch.randint(2**31, (), device="cpu"))
        box = [int(torch.randint(2**31, (), device="cpu"))]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def check_same(self, matrices: Tensor) -> None:
        """Raise, on all processes, unless ``matrices`` are equal on all; synchronizes with the device."""
        gathered = self.gather(matrices[:, 0])
        if not torch.equal(gathered, gathered[:1].expand_as(gathered)):
            raise RuntimeError(
                "The rotations must be the same on all processes, got different ones. Either (a) a checkpoint was "
                "loaded on some processes only, or (b) init='haar' drew different numbers on each, since the optimizer "
                "was built before torch.distributed.init_process_group(): build it afterwards."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return Processes(self.group)  # groups cannot be copied
