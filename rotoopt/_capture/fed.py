"""The inputs of the heads since the latest backward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor

from rotoopt._capture.fork import Fork
from rotoopt._capture.places import Place

Read = tuple[int, int, str | int]  # a task, the number of its module, and an argument


@dataclass
class Fed:
    """The inputs of the heads since the latest backward pass.

    Attributes:
        tasks: Whether any input of its heads required grad, by task.
        reads: The arguments of the heads in which inputs required grad.
        addresses: Memory addresses of all inputs.
    """

    tasks: dict[int, bool] = field(default_factory=dict)
    reads: set[Read] = field(default_factory=set)
    addresses: set[int] = field(default_factory=set)
    _forks: list[ref[Fork]] = field(default_factory=list)
    _earlier: list[ref[Fork]] = field(default_factory=list)

    @property
    def forks(self) -> list[Fork]:
        """The forks of all tensors whose graphs still exist."""
        return _living(self._forks)

    @property
    def earlier(self) -> list[Fork]:
        """Forks from before the latest backward pass, which may not have reached all of them."""
        return _living(self._earlier)

    def following(self) -> Fed:
        """Return the next one, for the inputs after a backward pass that has begun."""
        return Fed(_earlier=[ref(fork) for fork in (*self.forks, *self.earlier) if not fork.reached])

    def add(self, fork: Fork, rep: Tensor) -> None:
        """Record that ``rep``, the tensor of ``fork``, enters a head."""
        if fork.fed is not self:
            fork.fed = self
            self._forks.append(ref(fork))
            self.addresses.add(address(rep))

    def note(self, rep: Tensor, task: int, place: Place) -> None:
        """Record that ``rep`` enters the head of ``task`` at ``place``."""
        if rep.requires_grad:
            part, path = place
            self.tasks[task] = True
            self.reads.add((task, part, path[0]))
        else:
            self.tasks.setdefault(task, False)
            self.addresses.add(address(rep))

    def only_fork(self) -> Fork | None:
        """Return the fork of the only input whose gradient has not arrived yet; None if there are none or several."""
        unused = [fork for fork in self.forks if not fork.used]
        return unused[0] if len(unused) == 1 else None

    def has(self, fork: Fork) -> bool:
        """Whether ``fork`` is of these heads: not all that were reached are known."""
        return fork.reached or fork in self.forks or fork in self.earlier

    def may_be_all(self) -> bool:
        """Whether no fork from before the latest backward pass still waits for gradients."""
        return all(fork.reached for fork in self.earlier)

    def trained(self) -> frozenset[int]:
        """Return the tasks whose heads had an input that requires grad."""
        return frozenset(task for task, requires_grad in self.tasks.items() if requires_grad)

    def read_by(self, tasks: Collection[int]) -> frozenset[Read]:
        """Return the arguments of the heads of ``tasks`` in which inputs required grad."""
        return frozenset(read for read in self.reads if read[0] in tasks)

    def is_frozen(self, tasks: Iterable[int]) -> bool:
        """Whether the heads of ``tasks`` ran, and no input required grad whose graph still exists."""
        live = [fork.tasks for fork in self.forks]  # without a trial before the backbone was frozen
        return all(task in self.tasks and not any(task in found for found in live) for task in tasks)

    def described(self, names: Sequence[str]) -> str:
        """Describe the inputs of the heads of each task: shapes, and operations."""
        found: dict[int, list[str]] = {}
        for fork in self.forks:
            for task in fork.tasks:
                found.setdefault(task, []).append(f"{tuple(fork.shape)} made by {fork.made_by}")
        return "; ".join(f"{names[task]}: {', '.join(sorted(found[task]))}" for task in sorted(found)) or "nothing"


def address(tensor: Tensor) -> int:
    """Return the memory address of ``tensor``, which identifies views of it; zero if it has no ordinary storage."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _living(forks: Iterable[ref[Fork]]) -> list[Fork]:
    return [fork for each in forks if (fork := each()) is not None]
