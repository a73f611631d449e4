"""The backward pass, from the heads to their inputs: rotations, and the fork where gradients are collected.

In the forward pass every tensor z that enters head k passes a tap, which returns R_k z. In the backward pass the
gradient at z, R_k^T g_k, is handled in one of two ways. If the weight of the task is known, the gradient is multiplied
by it and passed on immediately. If the weights depend on the gradients of this pass, or the rotations are updated, it
is collected at the fork instead of being added to those of other tasks; when all have arrived, a hook on z passes their
combination on. So one ordinary ``sum(losses).backward()`` is enough, and everything that works with an ordinary
backward pass (DDP, checkpointing, compile) continues to work.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotoopt._capture.agreement import Sketch
from rotoopt._capture.backward_pass import BackwardPass
from rotoopt._capture.places import Place
from rotoopt._capture.representation import RotatedDims, rotated
from rotoopt._torch.private import register_first_hook, version
from rotoopt._torch.subclasses import plain

if TYPE_CHECKING:
    from rotoopt._capture.fed import Fed

SPENT = (
    "The losses of one forward pass must be back-propagated together and once, got a second backward pass. Either (a) "
    "step(losses) was called after backward(losses) or your own sum(losses).backward(): call step() without losses, or "
    "(b) every task has its own backward(): call sum(losses).backward() or optimizer.backward(losses), or (c) the "
    "gradients of single tasks are measured by torch.autograd.grad(): optimizer.last_step has measurements of them; "
    "compute others, as for a saliency map, from a forward pass under optimizer.paused()."
)

LOSSES_AS_HEADS = (
    "list the modules that compute the losses, with rotate=False, as in heads={'task': nn.BCELoss()}: everything in "
    "front of them then counts as backbone"
)

SECOND_ORDER = (
    "Gradients through heads must not be differentiated again, got create_graph=True. They are weighted outside of "
    "autograd. Either (a) detach the gradients of the inner steps, as first-order MAML does, and compute them under "
    "optimizer.paused(), (b) run the forward pass of a gradient penalty under optimizer.paused(), and pass the penalty "
    "as backbone_loss, or (c) if the losses depend on derivatives with respect to data, as the residual of a "
    f"differential equation, {LOSSES_AS_HEADS}, or (d) in MAML, run forward and backward under optimizer.paused(), and "
    "then optimizer.step() without losses: the model is then trained by the true gradients, without weighting."
)


class Fork:
    """The point where one tensor branches into heads, and where their gradients meet in the backward pass.

    Args:
        rep: The tensor z.
        dims: Its rotated dimensions.
        num_tasks: K.
        running: Returns the current backward pass.
        sketch: Projections of z, if the agreement is measured.

    Attributes:
        shape: The shape of z.
        dims: The same.
        version: The version counter of z.
        made_by: The operation that computed z, for errors about several tensors.
        is_leaf: Whether z is a parameter.
        rotated: Whether z is rotated in front of them.
        second_moment: Second moment of z, if it is needed to update the rotations. Shape ``(m, m)``.
        sketch: The same.
        fed: The inputs of the heads that it was recorded with.
        used: The tasks whose gradients arrived in the latest backward pass that collected them.
        reached: Whether any gradient has arrived.
    """

    def __init__(
        self,
        rep: Tensor,
        dims: RotatedDims,
        num_tasks: int,
        running: Callable[[], BackwardPass],
        sketch: Sketch | None,
    ) -> None:
        self.shape = rep.shape
        self.made_by = "a leaf" if rep.grad_fn is None else rep.grad_fn.name().partition("Backward")[0]
        self.is_leaf = rep.is_leaf
        self.dims = dims
        self.fed: Fed | None = None
        self.renew(rep, sketch)
        self._num_tasks = num_tasks
        self._running = running
        self._waiting: Tensor | None = None  # G, shape (K, *shape)
        self._arrived: set[int] = set()
        self._zero: Tensor | None = None  # what is passed on for the first gradient that is collected
        self._of: BackwardPass | None = None
        # A hook of the user, which may scale or clip the gradient at z, applies to the sum of all.
        register_first_hook(rep, self._join)

    def renew(self, rep: Tensor, sketch: Sketch | None) -> None:
        """Begin a forward pass with z."""
        self.version = version(rep)
        self._tasks: set[int] = set()
        self.rotated = False
        self._is_repeated = False  # whether it enters the heads of one task several times
        self.second_moment: Tensor | None = None
        self.sketch = sketch
        self.used: tuple[int, ...] = ()
        self.reached = False
        self._number: int | None = None  # of the latest backward pass
        self._returned = False

    def enter(self, task: int) -> None:
        """Record that z enters the head of ``task``."""
        self._is_repeated |= task in self._tasks
        self._tasks.add(task)

    def is_with(self, other: Fork) -> bool:
        """Whether both are of one optimizer."""
        return self._running == other._running

    @property
    def tasks(self) -> Set[int]:
        """The tasks whose heads z enters."""
        return self._tasks

    def _waits(self, this: BackwardPass) -> bool:
        """Whether gradients are collected: those of several tasks, or those of one task for a joint norm."""
        return not this.lagged or self._is_repeated or (this.meets and len(self._tasks) > 1)

    def arrive(self, task: int, grad: Tensor, matrix: Tensor | None) -> Tensor | None:
        """Return the part of the gradient of ``task`` that is passed on to z now; None if nothing is.

        Autograd calls the hook on z only if a gradient arrives there: for the first gradient that is collected, one
        zero is passed on, which takes no memory.

        Args:
            task: k.
            grad: The gradient at R_k z.
            matrix: R_k; None for I.
        """
        this, dims = self._running(), self.dims
        if self.reached and self._number != this.number:
            this.measures |= this.returns or self._returned
        self.reached, self._number, self._returned = True, this.number, this.returns
        if this.expected and task not in this.expected:  # zero: the losses read other parts of joined outputs
            return grad if matrix is None else rotated(grad, matrix, dims, back=True)
        if not self._waits(this):
            if self.second_moment is not None:
                this.lone_moments.append(self.second_moment)
            at_rep = grad if matrix is None else rotated(grad, matrix, dims, back=True)
            return this.pass_on(task, at_rep, self.sketch, in_place=matrix is not None)
        waiting = self._rows(this, grad)
        first, again = not self._arrived, task in self._arrived  # again: a head that was called twice
        if matrix is not None:
            has_room = not again and waiting.dtype == grad.dtype and dims.lie_side_by_side(grad.shape)
            grad = rotated(grad, matrix, dims, waiting[task] if has_room else None, back=True)
        if again:
            waiting[task] += grad
        elif matrix is None or not has_room:
            waiting[task] = grad
        self._arrived.add(task)
        self._zero = grad.new_zeros(()).expand(grad.shape) if first else self._zero
        return self._zero if first else None

    def _rows(self, this: BackwardPass, like: Tensor) -> Tensor:
        """Return the memory for the gradients of a backward pass. Shape ``(K, *z.shape)``."""
        if self._waiting is None or self._of is not this:  # or an earlier pass has failed and left gradients here
            self._waiting, self._arrived, self._of = like.new_empty((self._num_tasks, *self.shape)), set(), this
        return self._waiting

    def _join(self, grad: Tensor) -> Tensor:
        """Add the combination of the task gradients to ``grad``, the gradient from all other uses of z."""
        if self._waiting is None:
            return grad
        grads, tasks, has_other_uses = self._waiting, tuple(sorted(self._arrived)), grad is not self._zero
        self._waiting, self._arrived, self._zero, self._of = None, set(), None, None
        this = self._running()
        if not this.lagged:  # otherwise the gradients are independent
            if self.used not in ((), tasks):
                raise RuntimeError(SPENT)
            self.used = tasks
        for task in set(range(len(grads))) - set(tasks):
            grads[task] = 0.0
        combined = this.combine(this, grads, tasks, self).to(grad.dtype)
        return grad + combined if has_other_uses else combined


class Rotate(torch.autograd.Function):
    """Forward: R_k z. Backward: passes the gradient R_k^T g_k, in float32 or float64, to the fork."""

    @staticmethod
    def forward(ctx: Any, rep: Tensor, matrix: Tensor | None, fork: Fork, key: tuple[int, Place]) -> Tensor:
        """Return R_k z; z itself for a task that is not rotated."""
        ctx.save_for_backward(matrix)
        ctx.set_materialize_grads(False)
        ctx.fork, (ctx.task, ctx.place) = fork, key
        # Detached, so that autograd does not treat it as a view, and a head may begin with an in-place ReLU.
        return rep.view_as(rep) if matrix is None else rotated(rep, matrix, fork.dims).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """Return the gradient that the fork passes on."""
        if grad is None:  # the output was not used, but is returned by a function such as DistributedDataParallel's
            return None, None, None, None
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_ORDER)
        (matrix,) = ctx.saved_tensors
        is_wide = grad.dtype in (torch.float32, torch.float64)
        goes_on = ctx.fork.arrive(ctx.task, plain(grad if is_wide else grad.float()), matrix)
        return goes_on if goes_on is None or is_wide else goes_on.to(grad.dtype), None, None, None


class Turn(torch.autograd.Function):
    """R z under ``paused()``, with its true gradient.

    Saves what :class:`Rotate` saves, since a checkpoint computes it again in a backward pass outside of ``paused()``.
    """

    @staticmethod
    def forward(ctx: Any, rep: Tensor, matrix: Tensor, dims: RotatedDims, task: int) -> Tensor:
        """Return R z."""
        ctx.save_for_backward(matrix)
        ctx.matrix, ctx.dims, ctx.task = matrix, dims, task  # the matrix for jvp()
        return rotated(rep, matrix, dims).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient at z."""
        (matrix,) = ctx.saved_tensors
        return rotated(grad, matrix, ctx.dims, back=True), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        """Return the tangent at R z."""
        return rotated(tangent, ctx.matrix, ctx.dims)
