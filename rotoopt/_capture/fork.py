"""The backward pass, from the heads to the representation: rotations, the fork where gradients meet, what they measure.

In the forward pass a head gets R_k z. In the backward pass the gradient of task k at z, R_k^T g_k, goes one of two
ways. Where its weight is known, it goes on at once, times the weight: a tap. Where the weights need the gradients of
this pass, it waits at the fork instead of being added to that of the other tasks; when all have arrived, a hook on z
hands their combination on. So one ordinary ``sum(losses).backward()`` does it all, and everything that works with an
ordinary backward (DDP, checkpointing, compile) goes on working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rotoopt._capture.representation import RotatedDims, rotated
from rotoopt._rotation.step import RotationGradient
from rotoopt.weighting import Measurements
from rotoopt.weighting._measurements import Reference

SPENT = (
    "The losses of one forward pass must be back-propagated together and once, got a second backward pass. Either (a) "
    "step(losses) or backward(losses) came after your own sum(losses).backward(), which it replaces, or (b) every "
    "task has a backward() or torch.autograd.grad() of its own: the gradients of single tasks are in "
    "optimizer.last_step."
)


@dataclass
class BackwardPass:
    """Made before a backward pass or by its first gradient, filled by it, used by the step, and dropped.

    Attributes:
        number: torch's number of the pass; None where we run it, and know when it ends.
        losses: L_k over the joined batch, NaN for an absent task; None where the user back-propagates them. ``(K,)``.
        loss_scale: What the losses were multiplied by, as by a ``GradScaler``. Shape ``()``. None: one.
        weights: The weights, if they are known before the pass; None until the pass has made them. Shape ``(K,)``.
        waits: Whether the gradients of the tasks wait at the representation until all have arrived.
        combine: What becomes of gradients that waited.
        norm_reference: ||G_k(t0)||, with this pass.
        loss_reference: |L_k(t0)|, with this pass.
        tasks: The tasks whose gradients have arrived.
        norms: Norms of the gradients that did not wait, by task.
        measured: What was measured of gradients that waited.
        rotation_gradients: The gradients of the rotations, where these are to turn.
    """

    number: int | None
    losses: Tensor | None
    loss_scale: Tensor | None
    weights: Tensor | None
    waits: bool
    combine: Callable[[BackwardPass, Tensor, tuple[int, ...], RotatedDims], Tensor]
    norm_reference: Reference
    loss_reference: Reference
    tasks: set[int] = field(default_factory=set)
    norms: dict[int, list[Tensor]] = field(default_factory=dict)
    measured: Measurements | None = None
    rotation_gradients: list[RotationGradient] = field(default_factory=list)

    def pass_on(self, task: int, grad: Tensor) -> Tensor:
        """Measure the gradient of one task, and return it times its weight, which is known."""
        assert self.weights is not None
        self.tasks.add(task)
        self.norms.setdefault(task, []).append(torch.linalg.vector_norm(grad))
        return self.weights[task] * grad

    def norms_on_the_way(self, like: Tensor) -> Tensor:
        """Return the norms of the gradients that did not wait, zero for an absent task. Shape ``(K,)``, as ``like``."""
        zero = like.new_zeros(())
        norms = [torch.stack(self.norms[task]).norm() if task in self.norms else zero for task in range(len(like))]
        return torch.stack(norms).to(like.dtype)

    def join(self, grads: Tensor, tasks: tuple[int, ...], dims: RotatedDims) -> Tensor:
        """Return the gradient for the representation, of those that waited there.

        Args:
            grads: G. Shape ``(K, *shape)``, zero for absent tasks; changed in place.
            tasks: The tasks that are present.
            dims: The rotated dimensions of the representation.
        """
        if self.tasks and self.tasks.isdisjoint(tasks):
            raise RuntimeError(
                "All heads must get the same representation tensor, got two tensors, each for tasks of its own, in "
                "one backward pass. Likely causes: (a) a head is fed a view or a copy, as in head(z.flatten(1)): "
                "reshape once, before the first head, or (b) the tasks use different batches: give them in separate "
                "backward passes."
            )
        self.tasks.update(tasks)
        return self.combine(self, grads, tasks, dims)


class Fork:
    """The point where one representation goes to its heads, and where their gradients come back.

    Args:
        rep: The representation z.
        num_tasks: K.
        dims: The rotated dimensions of z.
        running: Returns the backward pass that runs.
    """

    def __init__(self, rep: Tensor, num_tasks: int, dims: RotatedDims, running: Callable[[], BackwardPass]) -> None:
        self._shape = (num_tasks, *rep.shape)
        self._dims = dims
        self._running = running
        self._waiting: Tensor | None = None  # G, shape (K, *shape)
        self._arrived: set[int] = set()
        self.joined: tuple[int, ...] = ()  # the tasks of the latest backward pass whose gradients waited here
        rep.register_hook(self._join)  # type: ignore[no-untyped-call]

    def arrive(self, task: int, grad: Tensor) -> Tensor | None:
        """Return what of the gradient of ``task`` goes on to z now; None where nothing does.

        Autograd calls the hook on z only if something arrives there: the first gradient that waits is followed by one
        zero, which takes no memory.
        """
        this = self._running()
        if not this.waits:
            return this.pass_on(task, grad)
        first = self._waiting is None
        if self._waiting is None:
            self._waiting = grad.new_empty(self._shape)
        if task in self._arrived:  # a head that was called twice
            self._waiting[task] += grad
        else:
            self._waiting[task] = grad
        self._arrived.add(task)
        return grad.new_zeros(()).expand(grad.shape) if first else None

    def _join(self, grad: Tensor) -> Tensor:
        """Add the combination of the task gradients to ``grad``, what all other uses of z contribute."""
        if self._waiting is None:
            return grad
        grads, tasks = self._waiting, tuple(sorted(self._arrived))
        self._waiting, self._arrived = None, set()
        if self.joined not in ((), tasks):
            raise RuntimeError(SPENT)
        self.joined = tasks
        for task in set(range(len(grads))) - set(tasks):
            grads[task] = 0.0
        return grad + self._running().join(grads, tasks, self._dims).to(grad.dtype)


@dataclass
class Fed:
    """What the heads were fed since the latest backward pass.

    Attributes:
        tasks: Whether the representation required grad, by task.
        forks: The forks of all representations whose graphs are still there.
    """

    tasks: dict[int, bool] = field(default_factory=dict)
    forks: WeakSet[Fork] = field(default_factory=WeakSet)

    def looks_complete(self, tasks: Iterable[int]) -> bool:
        """Whether it was one representation, for all of ``tasks``, and it was not used up yet."""
        unused = [not fork.joined for fork in self.forks]
        return unused == [True] and all(self.tasks.get(task) for task in tasks)

    def is_frozen(self, tasks: Iterable[int]) -> bool:
        """Whether all of ``tasks`` were fed a representation that does not require grad."""
        return all(self.tasks.get(task) is False for task in tasks)


class Rotate(torch.autograd.Function):
    """R_k z forward; backward, the gradient R_k^T g_k goes to the fork, in float32 or float64."""

    @staticmethod
    def forward(ctx: Any, rep: Tensor, matrix: Tensor | None, dims: RotatedDims, fork: Fork, task: int) -> Tensor:
        """Return R_k z; z itself, as a view, for a task that is not rotated."""
        ctx.save_for_backward(matrix)
        ctx.dims, ctx.fork, ctx.task = dims, fork, task
        # Detached, so that autograd takes it for no view, and a head may begin with an in-place ReLU.
        return rep.view_as(rep) if matrix is None else rotated(rep, matrix, dims).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Return what the fork lets pass."""
        (matrix,) = ctx.saved_tensors
        at_rep = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if matrix is not None:
            at_rep = rotated(at_rep, matrix.mT, ctx.dims)
        goes_on = ctx.fork.arrive(ctx.task, at_rep)
        return None if goes_on is None else goes_on.to(grad.dtype), None, None, None, None
