"""Watches: heads that deliver no gradient, parameters that nobody updates, and what else trains nothing."""

from __future__ import annotations

from collections.abc import Sequence

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
FOREIGN_PASSES = 32  # more than LBFGS makes in a step


class SilentHeads:
    """Warns of a head that delivers no gradient although its loss is there, or as far as one knows.

    Args:
        names: How to call the K tasks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._num_silent = [0] * len(names)  # steps since the latest gradient

    def observe(self, passes: Sequence[BackwardPass]) -> None:
        """Take note of a step with these backward passes."""
        delivered = {task for this in passes for task in this.tasks}
        expected = {task for this in passes for task in this.expected}
        own = any(this.number is not None for this in passes)  # where nobody says who is absent
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
                        "loss: it trains its head, and nothing else. Likely cause: its head reads z.detach(). If that "
                        "is meant, as for a probe, all is well."
                    )
                else:
                    warn_user(
                        f"Every head should deliver a gradient, got none from {name} in {SILENT_STEPS} steps of your "
                        "own backward(). Likely causes: (a) its loss is no part of what is back-propagated, or is "
                        "detached, (b) the head is bypassed, as by head.forward(z), or was replaced after the "
                        "optimizer was built, or (c) its task is absent from all of these batches, and all is well. "
                        "optimizer.step(losses) tells which."
                    )


class IdleSteps:
    """Warns of steps before which no head has run in training mode, so that nothing was weighed."""

    def __init__(self) -> None:
        self._count = 0

    def end(self) -> None:
        """Take note of a step that was none."""
        self._count = 0

    def observe(self, *, trained_before: bool) -> None:
        """Take note of one, after others in which heads ran if ``trained_before``."""
        self._count += 1
        if self._count == (SILENT_STEPS if trained_before else IDLE_STEPS):
            warn_user(
                f"The heads should have run in training mode before step(), got {self._count} steps and no head that "
                "ran. Either (a) the model stays in eval mode, as after a validation without model.train() behind it, "
                "(b) its heads are bypassed, as by head.forward(z), (c) the model that is trained is not the one whose "
                "heads were given, or (d) it was compiled and run before the optimizer was built: build it first."
            )


class FrozenRepresentation:
    """Warns once that nothing that entered the heads requires grad."""

    def __init__(self) -> None:
        self._warned = False

    def observe(self) -> None:
        """Take note of a step in which that is so."""
        if not self._warned:
            self._warned = True
            warn_user(
                "The representation should require grad, got one that does not. Either (a) the backbone is frozen: the "
                "heads are trained by a plain backward; rotations and weights rest, (b) `heads` holds the whole "
                "model, whose input is rotated then: give the modules that consume the representation, or (c) a head "
                "gets what it reads in an object of a class of its own, or has it stored: hand it over as an input."
            )


class UntrainedHeads:
    """Warns of parameters of heads that neither the wrapped optimizer updates nor, by the looks of it, another one.

    Args:
        optimizer: The wrapped optimizer.
        heads: The parts of the K heads.
        names: How to call the tasks.
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
        """Take note of a step."""
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
            # An optimizer that writes to `param.data` leaves the version as it was.
            if param.requires_grad and version(param) == old and torch.equal(_sum(param).cpu(), self._sums[key].cpu())
        ]
        self._watched = {}
        if untrained:
            warn_user(
                f"Every parameter of a head should be updated, by this optimizer or another one, got "
                f"{', '.join(untrained)} as they were {UNTRAINED_STEPS} steps ago. Pass model.parameters() to the "
                "optimizer, or freeze them: requires_grad_(False)."
            )


class ForeignSteps:
    """Warns of backward passes that the user calls and nobody steps on, while the weights of the heads change.

    Args:
        heads: The parts of the K heads.
    """

    def __init__(self, heads: Sequence[Parts]) -> None:
        self._watched = [param for parts in heads for _, param in _named_parameters(parts, "")]
        self._versions = 0

    def observe(self, num_waiting: int) -> None:
        """Take note of a backward pass that begins after ``num_waiting`` others that wait for a step."""
        if num_waiting not in (0, FOREIGN_PASSES):
            return
        versions = sum(version(param) for param in self._watched if not param.is_inference())
        before, self._versions = self._versions, versions
        if num_waiting == FOREIGN_PASSES and versions != before:
            warn_user(
                "The optimizer whose heads a loss passes through must make the steps, got weights that something else "
                f"has changed, and {FOREIGN_PASSES} backward passes without step() or zero_grad(). It weighs the "
                "gradients that something else steps on. Either (a) another optimizer has taken over: call remove() or "
                "fold() on the RotoGradOptimizer, or (b) step() was called on the wrapped optimizer: call it on the "
                "RotoGradOptimizer."
            )


def _sum(param: Tensor) -> Tensor:
    """Return a number that changes with ``param``."""
    return torch.zeros(()) if nn.parameter.is_lazy(param) else param.detach().double().abs().sqrt().sum()


def _named_parameters(parts: Parts, name: str) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a head, called by their names and that of the task."""
    found = []
    for number, part in enumerate(parts):
        of_task = name if len(parts) == 1 else f"{name}[{number}]"
        named = [("a parameter", part)] if isinstance(part, nn.Parameter) else part.named_parameters()
        found += [(f"{key} of {of_task}", param) for key, param in named]
    return found
