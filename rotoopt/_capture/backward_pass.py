"""The state of one backward pass: what is known before it, and what is measured during it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotoopt._capture.agreement import SampleSums, Sketch
from rotoopt.weighting import Measurements
from rotoopt.weighting._gradients import TaskGradients
from rotoopt.weighting._measurements import Reference, root_sum_square

if TYPE_CHECKING:
    from rotoopt._capture.fork import Fork


@dataclass(frozen=True)
class Met:
    """The gradients of several tasks that were collected at one tensor, for updating the rotations.

    Attributes:
        gradients: The gradients.
        shape: The shape of the tensor.
        turns: Whether they are used for an update of the rotations.
        second_moment: Second moment of the tensor, if it was measured. Shape ``(m, m)``.
    """

    gradients: TaskGradients
    shape: torch.Size
    turns: bool
    second_moment: Tensor | None


@dataclass
class BackwardPass:
    """Created before a backward pass or by its first gradient, filled during it, used by the step, and discarded.

    Attributes:
        number: torch's number of the pass; None if it is run by ``optimizer.backward``, which knows its end.
        losses: L_k over the joined batch, NaN for an absent task; None if the user called ``backward()``. ``(K,)``.
        magnified: Factor of the gradients relative to those of the losses over the joined batch, due to a
            ``GradScaler``, and to a mean over processes that is computed afterwards. None: one.
        weights: The weights if they are known before the pass; None until the pass has computed them. Shape ``(K,)``.
        lagged: Whether the weights were known before the pass.
        meets: Whether gradients of several tasks are collected at a tensor although the weights are known.
        combine: Combines collected gradients.
        known_norms: The latest nonzero ||G_k||, including this pass; zero if there was none. Shape ``(K,)``.
        norm_reference: ||G_k(t0)||, including this pass.
        loss_reference: |L_k(t0)|, including this pass.
        returns: Whether ``torch.autograd.grad`` runs it, and adds to no ``.grad``.
        measures: Whether it or an earlier pass through the same tensors did so: one of them trains nothing.
        expected: The tasks whose losses are back-propagated, if known; empty for all whose gradients arrive.
        tasks: The tasks whose gradients have arrived.
        squares: Squared norms of the gradients that were weighted on arrival, by task: one for each tensor that entered
            its heads.
        norms: Norms of the gradients that were collected although the weights were known, zero for an absent task: one
            for each tensor. Shape ``(K,)``.
        measured: The measurements, after the pass.
        met: Collected gradients.
        lone_moments: Second moments of the rotated tensors that single tasks read, if they were measured.
        sample_sums: Sums over samples, one for each tensor whose agreement is measured.
    """

    number: int | None
    losses: Tensor | None
    magnified: Tensor | float | None
    weights: Tensor | None
    lagged: bool
    meets: bool
    combine: Callable[[BackwardPass, Tensor, tuple[int, ...], Fork], Tensor]
    known_norms: Tensor
    norm_reference: Reference
    loss_reference: Reference
    returns: bool = False
    measures: bool = False
    expected: frozenset[int] = frozenset()
    tasks: set[int] = field(default_factory=set)
    squares: dict[int, list[Tensor]] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)
    measured: Measurements | None = None
    met: list[Met] = field(default_factory=list)
    lone_moments: list[Tensor] = field(default_factory=list)
    sample_sums: list[SampleSums] = field(default_factory=list)

    def pass_on(self, task: int, grad: Tensor, sketch: Sketch | None, *, in_place: bool) -> Tensor:
        """Measure the gradient of one task, and return it times its weight, which is known."""
        assert self.weights is not None
        self.tasks.add(task)
        square = _squared_norm(grad)
        self.squares.setdefault(task, []).append(square)
        if sketch is not None:  # of the unit gradient, whose squares neither overflow nor underflow
            norm = square.sqrt()
            sums = sketch.sums(torch.where(norm > 0, grad / norm, 0.0)[None])
            self.sample_sums.append(sums.scaled(norm).of_task(task, len(self.weights)))
        weight = self.weights[task]
        return grad.mul_(weight) if in_place else grad * weight  # new memory takes longer than the product

    @property
    def read_one_tensor(self) -> bool:
        """Whether the heads of all tasks have read one tensor, at which their gradients were collected."""
        return not self.squares and len(self.norms) == 1

    def joint_norms(self) -> Tensor:
        """Return the norms over all tensors, zero for an absent task. Shape ``(K,)``."""
        norms = [*self.norms, self._norms_on_arrival()] if self.squares else self.norms
        joint = norms[0] if len(norms) == 1 else root_sum_square(torch.stack(norms))
        return joint if joint.dtype == torch.float64 else joint.to(self.known_norms)

    def _norms_on_arrival(self) -> Tensor:
        """Return the norms over all tensors at which gradients were weighted on arrival. Shape ``(K,)``."""
        tasks, device = range(len(self.known_norms)), self.known_norms.device
        absent = [] if len(self.squares) == len(tasks) else [self.known_norms.new_zeros(())]
        squares = [[each.to(device) for each in self.squares.get(task, absent)] for task in tasks]
        return torch.stack([each[0] if len(each) == 1 else torch.stack(each).sum() for each in squares]).sqrt_()


def _squared_norm(grad: Tensor) -> Tensor:
    """Return the squared norm of ``grad``; on a CPU, ``dot`` takes less than half of the time, and rounds less."""
    if grad.is_contiguous():
        flat = grad.view(-1)
        return torch.dot(flat, flat)
    norm: Tensor = torch.linalg.vector_norm(grad)
    return norm.square()
