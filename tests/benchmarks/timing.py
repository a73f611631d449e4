"""Measurements of overhead.py: step times in turns, peak memory, and whether a step waits for the GPU."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.cases import Case, Training


def machine(threads: int, device: str) -> str:
    """Describe the machine of the measurement."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    parts = [cpu, f"{os.cpu_count()} cores, of which {threads} used", f"torch {torch.__version__}"]
    return ", ".join(parts if device == "cpu" else [torch.cuda.get_device_name(), *parts])


def seconds_per_step(training: Training, steps: int, *, cpu_time: bool = False) -> float:
    """Return the mean time of ``steps`` consecutive steps: on a GPU between two events, else wall or CPU time."""
    if training.batch.is_cuda:
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(steps):
            training.step()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / steps
    clock = time.process_time if cpu_time else time.perf_counter
    before = clock()
    for _ in range(steps):
        training.step()
    return (clock() - before) / steps


def take_turns(
    timers: Mapping[str, Callable[[], float]], rounds: int, at_most: Mapping[str, int]
) -> dict[str, list[float]]:
    """Call every timer once per round, after a warm-up round.

    Args:
        timers: Each times one block of steps and returns the seconds per step.
        rounds: How often each is called.
        at_most: Timers that run only in the first rounds, and the number of these rounds.

    Returns:
        The results, in the order of the rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds + 1):
        for name, timer in timers.items():
            if turn <= at_most.get(name, rounds):
                seconds[name].append(timer())
    return {name: blocks[1:] for name, blocks in seconds.items()}


def peak_bytes(case: Case, variant: str, device: torch.device, steps: int) -> int:
    """Return the peak size of all tensors, from the construction of the network to the end of step ``steps``.

    On a CPU the profiler reports all allocations of torch, including temporary buffers inside of operations, but not
    those of BLAS and LAPACK. Unlike the resident size of the process, the number is the same in every run.
    """
    gc.collect()  # otherwise garbage would be counted
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds_per_step(Training(case, variant, device), steps)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        seconds_per_step(Training(case, variant, device), steps)
    recorded: Any = profiler.profiler  # the public interfaces to these events write files
    events = (event for event in recorded.kineto_results.events() if event.name() == "[memory]")
    changes: list[tuple[int, int]] = sorted((event.start_ns(), event.nbytes()) for event in events)
    return max(accumulate(size for _, size in changes))


def synchronization(training: Training, steps: int) -> str:
    """Report whether ``optimizer.step(losses, rep)`` makes the host wait for the GPU."""
    for _ in range(steps):
        losses, rep = training.forward()
        training.optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.update(losses, rep)
        except RuntimeError as error:
            return f"found: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "none found"
