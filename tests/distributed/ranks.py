"""Two processes of one gloo group, which wait for functions to run: starting them takes longer than most tests."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COUNT = 2
TIMEOUT = 60.0  # seconds, for a function on both ranks: a deadlock must fail, not hang


class Ranks:
    """Runs a function on both ranks at once.

    Args:
        rendezvous: A file for the rendezvous of the processes.
    """

    def __init__(self, rendezvous: Path) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(COUNT)]
        self._connections = [own for own, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, rendezvous, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return ``function(rank, *args)`` of both ranks, or raise the exception of one of them."""
        for connection in self._connections:
            connection.send((function, args))
        answers = []  # of both, even if one failed: no result may be left for the next function
        for rank, connection in enumerate(self._connections):
            answered = connection.poll(TIMEOUT)
            if not answered:
                self._kill()  # otherwise each later function would wait as long
            assert answered, f"rank {rank} did not answer: a deadlock?"
            answers.append(connection.recv())
        for rank, (succeeded, result) in enumerate(answers):
            assert succeeded, f"on rank {rank}:\n{result}"
        return [result for _, result in answers]

    def stop(self) -> None:
        """End the processes."""
        for connection in self._connections:
            with suppress(ConnectionError):  # of a process that has ended
                connection.send(None)
        for process in self._processes:
            process.join(10)
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


def _serve(rank: int, rendezvous: Path, connection: Connection) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=COUNT, timeout=timeout)
    while (job := connection.recv()) is not None:
        function, args = job
        try:
            torch.manual_seed(rank)
            connection.send((True, function(rank, *args)))
        except Exception:
            connection.send((False, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()
