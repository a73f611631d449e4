"""The rotation in front of a head, and the point where the gradients of the heads come back: autograd's view of both.

In the forward pass a head gets R_k z. In the backward pass the gradient of task k at z, R_k^T g_k, goes one of two
ways. Where its weight is known, it goes on at once, times the weight: a tap. Where the weights need the gradients of
this pass, it waits at the fork instead of being added to that of the other tasks; when all have arrived, a hook on z
hands their combination on. So one ordinary ``sum(losses).backward()`` does it all, and everything that works with an
ordinary backward (DDP, checkpointing, compile) goes on working.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rotoopt._capture.backward_pass import BackwardPass
from rotoopt._capture.representation import RotatedDims, rotated

SPENT = (
    "The losses of one forward pass must be back-propagated together and once, got a second backward pass. Either (a) "
    "step(losses) or backward(losses) came after your own sum(losses).backward(), which it replaces, or (b) every "
    "task has a backward() or torch.autograd.grad() of its own: the gradients of single tasks are in "
    "optimizer.last_step."
)


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
