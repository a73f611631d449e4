"""Latest weights: a few values of each head after a step, to detect that something else has written weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt._capture.whereabouts import is_here
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.private import is_transformed, named_parameter, not_compiled
from rotoopt._torch.warn import warn_user

NUM_VALUES = 16  # of each head
LOOK_EVERY = 16

# A parameter, and the module and the name under which functional_call() puts others in its place.
Watched = tuple[nn.Parameter, nn.Module | None, str]
Values = tuple[list[Any], list[Tensor]]  # what must be equal to compare them, and the values, a tensor per device

WRITTEN = (
    "Weights of a head should be replaced together with its rotation, got other weights of {names} than after the "
    "latest step. The rotations have been updated in training: earlier weights give wrong predictions with those of "
    "today. Either (a) weights that were kept as a list or vector, or averages of weights, were written into the "
    "model, or given to functional_call(): keep copy.deepcopy(model.state_dict()) and load it with "
    "model.load_state_dict(...), or use AveragedModel and optimizer.refresh(averaged), (b) the weights were changed "
    "after that step, for instance pruned, constrained or updated by another optimizer, which is fine, or (c) they "
    "were initialized again, as for a new fold of a cross-validation: call optimizer.remove() before, and build a new "
    "optimizer."
)


class LatestWeights:
    """Warns once if evaluated weights of heads are not those of the latest step.

    They may be earlier ones, trained with other rotations. Not reported are weights that also change between a step
    and the next one, such as those that are clipped after each step, which is known from the second step on.

    Args:
        rotations: The K rotations.

    Attributes:
        is_noted: Whether there are weights to compare with.
    """

    def __init__(self, rotations: Rotations) -> None:
        self.is_noted = False
        self._rotations = rotations
        self._watched: dict[int, Watched] | None = None  # by task
        self._names: Sequence[str] = ()
        self._noted: Values | None = None
        self._between: tuple[Values, Values] | None = None  # after a step, and before the next one
        self._first_angles: Tensor | None = None
        self._angles: Tensor | None = None
        self._num_steps = 0
        self._seen: set[int] = set()  # tasks in the present forward pass
        self._is_evaluated = False  # since the latest step
        self._num_evaluated = 0  # steps before it, without a gap
        self._warned = False

    def __reduce__(self) -> tuple[type[LatestWeights], tuple[Rotations]]:
        return LatestWeights, (self._rotations,)  # a copy of a head has no copy of the other heads

    def begin_step(self, total_angles: Tensor) -> None:
        """Record the state before a step: sometimes the weights, to find out whether they change between steps."""
        if self._first_angles is None:
            self._first_angles = total_angles
        if self._noted is not None and self._num_steps % LOOK_EVERY == 1 and not self._warned:
            self._between = self._noted, self._values()

    def end_step(
        self,
        optimizer: Optimizer,
        heads: Sequence[Sequence[nn.Module | nn.Parameter]],
        names: Sequence[str],
        total_angles: Tensor,
    ) -> None:
        """Record the weights after a step, with one operation per device.

        Args:
            optimizer: The wrapped optimizer.
            heads: The modules and parameters of each task.
            names: Names of the tasks.
            total_angles: The angles of all updates of the rotations so far. Shape ``(K,)``.
        """
        if self._watched is None:
            self._watched, self._names = self._largest(optimizer, heads), names
        if self._watched and not self._warned:
            self._noted, self._angles = self._values(), total_angles
            self._num_steps += 1
            self._num_evaluated = self._num_evaluated + 1 if self._is_evaluated else 0
            self._is_evaluated = False
            self.is_noted = True

    def forget(self) -> None:
        """Record that weights or rotations are being loaded: those that are evaluated next belong together."""
        self._noted = None

    @not_compiled
    def check(self, task: int) -> None:
        """Compare the weights when the head of ``task`` is evaluated.

        Writing to ``param.data`` does not change the version counter, so values are compared. On a device, which this
        synchronizes with, it is done once per forward pass; and if a part of every training step is an evaluation, in
        some steps only.
        """
        is_first = not self._seen or task in self._seen
        self._seen = {task} if is_first else {*self._seen, task}
        self._is_evaluated = True
        is_routine = self._num_evaluated > LOOK_EVERY and self._num_steps % LOOK_EVERY > 0
        if is_transformed() or _is_recorded() or (self._waits() and (not is_first or is_routine)):
            return
        noted, now = self._noted, self._values()
        if noted is None or noted[0] != now[0]:  # moved or cast
            self._noted = now
        elif self._between is not None and not _are_equal(noted, now) and _are_equal(*self._between):
            self._report()

    def _waits(self) -> bool:
        """Whether reading values synchronizes with a device."""
        return any(param.device.type != "cpu" for param, _, _ in (self._watched or {}).values())

    def _report(self) -> None:
        assert self._angles is not None  # there was a step
        assert self._first_angles is not None
        turned = (self._angles != self._first_angles.to(self._angles)).tolist()
        names = [self._names[task] for task in self._watched or () if turned[task]]
        if names:
            self._warned, self.is_noted = True, False
            warn_user(WRITTEN.format(names=", ".join(names)))

    def _largest(self, optimizer: Optimizer, heads: Sequence[Sequence[nn.Module | nn.Parameter]]) -> dict[int, Watched]:
        """Return the largest parameter of each rotated head that ``optimizer`` updates, by task."""
        updated = {id(param) for group in optimizer.param_groups for param in group["params"]}
        found = {}
        for task, parts in enumerate(heads):
            watched = [each for part in parts for each in _parameters(part)]
            usable = [
                each for each in watched if id(each[0]) in updated and each[0].requires_grad and _is_read(each[0])
            ]
            if usable and self._rotations.rotate[task]:
                found[task] = max(usable, key=lambda each: each[0].numel())
        return found

    @torch.no_grad()
    def _values(self) -> Values:
        """Return some values of each head, with one operation per device."""
        kinds: list[Any] = []
        parts: dict[torch.device, list[Tensor]] = {}
        for param in map(_present, (self._watched or {}).values()):
            size, device = param.numel(), param.device
            kinds.append((size, param.dtype, device))
            part = param.as_strided((min(size, NUM_VALUES),), (max(size // NUM_VALUES, 1),))
            parts.setdefault(device, []).append(part)
        return kinds, [torch.cat(each) for each in parts.values()]


def _parameters(part: nn.Module | nn.Parameter) -> list[Watched]:
    if isinstance(part, nn.Parameter):
        return [(part, None, "")]
    return [(p, module, name) for module in part.modules() for name, p in module.named_parameters(recurse=False)]


def _present(watched: Watched) -> Tensor:
    """Return the parameter, or what functional_call() has put in its place."""
    param, module, name = watched
    now = param if module is None else named_parameter(module, name)
    return param if now is param or now is None or not _is_read(now) else now


def _is_read(param: Tensor) -> bool:
    """Whether some values of ``param`` can be read without moving it."""
    return is_here(param) and param.is_contiguous()


def _are_equal(first: Values, second: Values) -> bool:
    """Whether values are equal, also where they are NaN."""
    if first[0] != second[0]:
        return True  # unknown
    return all(torch.equal(*map(torch.nan_to_num, pair)) for pair in zip(first[1], second[1], strict=True))


def _is_recorded() -> bool:
    """Whether operations are recorded in a CUDA graph, in which nothing can be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
