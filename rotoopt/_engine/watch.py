"""Warnings: heads without gradients or that train something else, parameters that are not updated, idle steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt._capture.backward_pass import BackwardPass
from rotoopt._engine.construction import Parts
from rotoopt._torch.private import version
from rotoopt._torch.warn import warn_user

SILENT_STEPS = 20
IDLE_STEPS = 2
UNTRAINED_STEPS = 10
BORROWED_PASSES = 2  # one may come from a step that a GradScaler has skipped
FOREIGN_PASSES = 32  # more than LBFGS makes in a step


class SilentHeads:
    """Warns of a head that gets no gradient although its loss is present, as far as is known.

    Args:
        names: Names of the K tasks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._num_silent = [0] * len(names)  # steps since the latest gradient

    def observe(self, passes: Sequence[BackwardPass]) -> None:
        """Record a step with these backward passes."""
        delivered = {task for this in passes for task in this.tasks}
        expected = {task for this in passes for task in this.expected}
        own = any(this.number is not None for this in passes)  # the user's: absent tasks are unknown
        for task, name in enumerate(self._names):
            if task in delivered:
                self._num_silent[task] = 0
            elif (own or task in expected) and self._num_silent[task] < SILENT_STEPS:
                self._num_silent[task] += 1
                if self._num_silent[task] < SILENT_STEPS:
                    continue
                if task in expected:
                    warn_user(
                        f"Every head should deliver a gradient, got none from {name} in {SILENT_STEPS} steps with its "
                        "loss: it trains its head, but not the backbone. Likely cause: its head reads z.detach(). If "
                        "this is intended, as for a probe, ignore this."
                    )
                else:
                    warn_user(
                        f"Every head should deliver a gradient, got none from {name} in {SILENT_STEPS} steps of your "
                        "own backward(). Likely causes: (a) its loss is not part of the sum, or is detached, (b) the "
                        "head is bypassed, as by head.forward(z), or was replaced after the optimizer was built, or "
                        "(c) its task is absent from all of these batches, which is fine. optimizer.step(losses) can "
                        "distinguish these."
                    )


class IdleSteps:
    """Warns of steps before which no head has run in training mode, so that no gradient was weighted."""

    def __init__(self) -> None:
        self._count = 0

    def end(self) -> None:
        """Record a step after heads have run."""
        self._count = 0

    def observe(self, *, trained_before: bool) -> None:
        """Record a step without; ``trained_before``: heads ran before earlier steps."""
        self._count += 1
        if self._count == (SILENT_STEPS if trained_before else IDLE_STEPS):
            warn_user(
                f"The heads should have run in training mode before step(), got {self._count} steps and no head that "
                "ran. Either (a) the model is in eval mode, for example after a validation without model.train(), (b) "
                "its heads are bypassed, as by head.forward(z), or run under torch.func, (c) the model that is trained "
                "is not the one whose heads were given, (d) it was compiled and run before the optimizer was built: "
                "build it first, (e) optimizer.zero_grad() comes between backward() and step(), and discards what was "
                "measured: call it before backward(), or (f) remove() or fold() has ended the weighting: step the "
                "wrapped optimizer, optimizer.optimizer, instead."
            )


class FrozenRepresentation:
    """Warns once if no input of the heads requires grad.

    Attributes:
        in_step: Whether the current step had such losses.
    """

    def __init__(self) -> None:
        self.in_step = self._warned = False

    def observe(self) -> None:
        """Record such losses."""
        self.in_step = True
        if not self._warned:
            self._warned = True
            warn_user(
                "The representation should require grad, got one that does not. Either (a) the backbone is frozen: "
                "the heads are trained as usual, without weights or updates of the rotations, (b) `heads` holds the "
                "whole model, whose input is then rotated: pass the modules that read the representation, or (c) the "
                "input of a head is inside an object of a custom class, or stored in the head: pass it as an input."
            )


class UntrainedHeads:
    """Warns of parameters of heads that are updated neither by the wrapped optimizer nor, apparently, by another one.

    Args:
        optimizer: The wrapped optimizer.
        heads: The parts of the K heads.
        names: Names of the tasks.
    """

    def __init__(self, optimizer: Optimizer, heads: Sequence[Parts], names: Sequence[str]) -> None:
        updated = {id(param) for group in optimizer.param_groups for param in group["params"]}
        self._num_steps = 0
        self._sums: dict[str, Tensor] = {}
        self._watched = {
            key: (param, version(param))
            for name, parts in zip(names, heads, strict=False)  # functional heads have names only
            for key, param in _named_parameters(parts, name)
            if id(param) not in updated and param.requires_grad
        }

    def observe(self) -> None:
        """Record a step."""
        if not self._watched:
            return
        self._num_steps += 1
        if self._num_steps == 1:
            self._sums = {key: _sum(param) for key, (param, _) in self._watched.items()}
        if self._num_steps < UNTRAINED_STEPS:
            return
        untrained = [
            key
            for key, (param, old) in self._watched.items()
            # An optimizer that writes to `param.data` does not change the version counter.
            if param.requires_grad and version(param) == old and torch.equal(_sum(param).cpu(), self._sums[key].cpu())
        ]
        self._watched = {}
        if untrained:
            warn_user(
                f"Every parameter of a head should be updated, by this optimizer or another one, got no change of "
                f"{', '.join(untrained)} in {UNTRAINED_STEPS} steps. Pass model.parameters() to the optimizer, or "
                "freeze them: requires_grad_(False)."
            )


class ForeignSteps:
    """Warns of backward passes of the user without steps, while the weights of the heads change.

    Args:
        heads: The parts of the K heads.
    """

    def __init__(self, heads: Sequence[Parts]) -> None:
        self._watched = [param for parts in heads for _, param in _named_parameters(parts, "")]
        self._versions = 0

    def observe(self, num_waiting: int) -> None:
        """Record a backward pass that begins after ``num_waiting`` others without a step."""
        if num_waiting not in (0, FOREIGN_PASSES):
            return
        versions = sum(version(param) for param in self._watched if not param.is_inference())
        before, self._versions = self._versions, versions
        if num_waiting == FOREIGN_PASSES and versions != before:
            warn_user(
                "The optimizer whose heads a loss passes through must make the steps, got weights that something else "
                f"has changed, and {FOREIGN_PASSES} backward passes without step() or zero_grad(). It weights the "
                "gradients that something else uses. Either (a) another optimizer has replaced it: call remove() or "
                "fold() on the RotoGradOptimizer, or (b) step() was called on the wrapped optimizer: call it on the "
                "RotoGradOptimizer."
            )


class BorrowedHeads:
    """Warns of backward passes that train something else through the heads, such as a generator or an actor.

    These are discarded, by ``zero_grad()`` of the optimizer, the model or the heads, after another optimizer has
    updated some parameters behind the heads. If it has updated all of them, they may be a backbone that this optimizer
    does not train; but not if other parameters were behind the heads in steps of this optimizer.

    Args:
        heads: The parts of the K heads.
    """

    def __init__(self, heads: Sequence[Parts]) -> None:
        self._own = [param for parts in heads for _, param in _named_parameters(parts, "")]
        self._noted: list[tuple[Tensor, int]] = []  # parameters behind the heads, and their version counters
        self._stepped: set[int] = set()  # ids of those that were behind the heads in steps
        self._count = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_noted": [], "_stepped": set()}  # a copy of a head has no copy of the backbone

    def begin(self, shared: Sequence[Tensor]) -> None:
        """Record a backward pass, with the parameters behind the heads if its graph was searched."""
        moved = {id(param) for param, old in self._noted if version(param) != old}
        kept = [param for param, _ in self._noted if id(param) not in moved]
        is_other = bool(moved and self._stepped and not moved & self._stepped)
        own = [param for param in self._own if is_other and param.requires_grad]
        if moved and (kept or own) and all(param.grad is None for param in kept or own):
            self._noted = []
            self._count_discarded()
        if shared:
            self._noted = [(param, version(param)) for param in shared]

    def forget(self) -> None:
        """Record a step with the noted backward pass."""
        self._stepped.update(id(param) for param, _ in self._noted)
        self._noted = []

    def observe(self, optimizer: Optimizer) -> None:
        """Record ``zero_grad()``."""
        noted, self._noted = self._noted, []
        moved = {id(param) for param, old in noted if version(param) != old}
        if not moved:
            return
        updated = {id(param) for group in optimizer.param_groups for param in group["params"]}
        trains_some = any(id(param) in updated for param, _ in noted)
        if not moved & updated and (trains_some or (self._stepped and not moved & self._stepped)):
            self._count_discarded()

    def _count_discarded(self) -> None:
        self._count += 1
        if self._count == BORROWED_PASSES:
            warn_user(
                "A backward pass through the heads should train parameters of their optimizer, got one that "
                "zero_grad() has discarded, after another optimizer had updated other parameters: their gradients were "
                "weighted. If something else is trained through the heads, as the generator of a GAN through its "
                "discriminator or an actor through its critics, run that forward pass under optimizer.paused(): its "
                "gradients are then true ones."
            )


def _sum(param: Tensor) -> Tensor:
    """Return a number that changes with ``param``."""
    return torch.zeros(()) if nn.parameter.is_lazy(param) else param.detach().double().abs().sqrt().sum()


def _named_parameters(parts: Parts, name: str) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a head, with their names and that of the task."""
    found = []
    for number, part in enumerate(parts):
        of_task = name if len(parts) == 1 else f"{name}[{number}]"
        named = [("a parameter", part)] if isinstance(part, nn.Parameter) else part.named_parameters()
        found += [(f"{key} of {of_task}", param) for key, param in named]
    return found
