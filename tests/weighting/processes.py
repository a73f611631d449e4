"""Processes simulated by threads, to test their communication without starting processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from rotoopt._torch.processes import Processes

T = TypeVar("T")


class ThreadProcesses(Processes):
    """One of several threads, which synchronize whenever processes communicate.

    Args:
        rank: Its rank.
        told: Data of each thread, shared by all.
        meeting: Barrier of the threads.
    """

    def __init__(self, rank: int, told: list[Tensor], meeting: Barrier) -> None:
        super().__init__()
        self._rank, self._told, self._meeting = rank, told, meeting

    @property
    def count(self) -> int:
        return len(self._told)

    @property
    def rank(self) -> int:
        return self._rank

    def gather(self, local: Tensor) -> Tensor:
        self._told[self._rank] = local
        self._meeting.wait()
        gathered = torch.stack(self._told)
        self._meeting.wait()
        return gathered

    def sum_(self, tensor: Tensor) -> None:
        tensor.copy_(self.gather(tensor).sum(0))


def together(count: int, function: Callable[[Processes], T]) -> list[T]:
    """Return ``function(processes)`` of each of ``count`` processes."""
    told, meeting = [torch.empty(0)] * count, Barrier(count)

    def run(rank: int) -> T:
        try:
            return function(ThreadProcesses(rank, told, meeting))
        except BaseException:
            meeting.abort()  # otherwise the others would wait forever
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
