"""Clock: the time of a training step, from one step of an optimizer to the next."""

from __future__ import annotations

import time
from collections import defaultdict
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from rotoopt.optimizer import TURN_EVERY

# Number of steps whose times are averaged before taking the median; a median of single steps would not include updates
# of the rotations.
BLOCK = TURN_EVERY


class StepClock:
    """Context that records when optimizers step.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> with StepClock() as clock:
        ...     for _ in range(3):
        ...         sgd.step()
        >>> clock.seconds_per_step() < 1
        True
    """

    def __init__(self) -> None:
        self._number: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._times: defaultdict[int, list[float]] = defaultdict(list)

    def __enter__(self) -> StepClock:
        self._hook = register_optimizer_step_post_hook(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._times[self._number.setdefault(optimizer, len(self._number))].append(time.perf_counter())

    def seconds_per_step(self) -> float | None:
        """Return the time between steps of the optimizer with the most steps; None if none made two.

        The median of the means over blocks of 32 steps: it includes updates of the rotations, and is robust to warm-up
        and to tests between epochs.
        """
        times = torch.tensor(max(self._times.values(), key=len, default=[]), dtype=torch.float64)
        seconds = times.diff()
        if len(seconds) == 0:
            return None
        return seconds.unfold(0, min(BLOCK, len(seconds)), min(BLOCK, len(seconds))).mean(dim=1).median().item()
