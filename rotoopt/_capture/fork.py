"""The backward pass, from the heads to what entered them: rotations, the fork where gradients meet, what they measure.

In the forward pass every tensor z that enters head k passes a tap, which hands R_k z on. In the backward pass the
gradient at z, R_k^T g_k, goes one of two ways. Where the weight of the task is known, the gradient goes on at once,
times the weight. Where the weights need the gradients of this pass, or the rotations turn, it waits at the fork
instead of being added to that of the other tasks; when all have arrived, a hook on z hands their combination on. So
one ordinary ``sum(losses).backward()`` does it all, and everything that works with an ordinary backward (DDP,
checkpointing, compile) goes on working.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from rotoopt._capture.agreement import SampleSums, Sketch
from rotoopt._capture.places import Place
from rotoopt._capture.representation import RotatedDims, rotated
from rotoopt._torch.private import register_first_hook, version
from rotoopt._torch.subclasses import plain
from rotoopt.weighting import Measurements
from rotoopt.weighting._gradients import TaskGradients
from rotoopt.weighting._measurements import Reference, root_sum_square

SPENT = (
    "The losses of one forward pass must be back-propagated together and once, got a second backward pass. Either (a) "
    "step(losses) or backward(losses) came after your own sum(losses).backward(), which it replaces, or (b) every "
    "task has a backward() or torch.autograd.grad() of its own: the gradients of single tasks are in "
    "optimizer.last_step."
)

SECOND_ORDER = (
    "Gradients through heads must not be differentiated again, got create_graph=True. They are weighted outside of "
    "autograd. Either (a) detach the gradients of the inner steps, as first-order MAML does, and compute them under "
    "optimizer.paused(), or (b) where the loss is one of derivatives, as in MAML or of the residual of a differential "
    "equation, run forward and backward under optimizer.paused(), and then optimizer.step() without losses: the true "
    "gradients train the model, and no task is weighted."
)


@dataclass(frozen=True)
class Met:
    """The gradients of several tasks that met at one tensor, for the rotations to turn.

    Attributes:
        gradients: The gradients.
        shape: The shape of the tensor.
        turns: Whether the rotations turn by them.
        second_moment: That of the tensor, if it was measured. Shape ``(m, m)``.
    """

    gradients: TaskGradients
    shape: torch.Size
    turns: bool
    second_moment: Tensor | None


@dataclass
class BackwardPass:
    """Made before a backward pass or by its first gradient, filled by it, used by the step, and dropped.

    Attributes:
        number: torch's number of the pass; None where we run it, and know when it ends.
        losses: L_k over the joined batch, NaN for an absent task; None where the user back-propagates them. ``(K,)``.
        magnified: How many times larger the gradients are than those of the losses over the joined batch, by a
            ``GradScaler``, and by a mean over processes that is taken afterwards. None: one.
        weights: The weights, if they are known before the pass; None until the pass has made them. Shape ``(K,)``.
        lagged: Whether the weights were known before the pass.
        meets: Whether gradients of several tasks at one tensor wait for each other, although weights are known.
        combine: What becomes of gradients that waited.
        known_norms: The latest ||G_k|| that is not zero, with this pass; zero where there was none. Shape ``(K,)``.
        norm_reference: ||G_k(t0)||, with this pass.
        loss_reference: |L_k(t0)|, with this pass.
        tasks: The tasks whose gradients have arrived.
        norms: Norms of the gradients that have arrived, by task: one for each tensor that entered its heads. Only if
            the weights were known.
        measured: What was measured, when the pass is over.
        met: Gradients that have met.
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
    tasks: set[int] = field(default_factory=set)
    norms: dict[int, list[Tensor]] = field(default_factory=dict)
    measured: Measurements | None = None
    met: list[Met] = field(default_factory=list)
    sample_sums: list[SampleSums] = field(default_factory=list)

    def pass_on(self, task: int, grad: Tensor, sketch: Sketch | None) -> Tensor:
        """Measure the gradient of one task, and return it times its weight, which is known."""
        assert self.weights is not None
        norm = torch.linalg.vector_norm(grad)
        self.note(task, norm)
        if sketch is not None:  # of the unit gradient, whose squares neither overflow nor vanish
            sums = sketch.sums(torch.where(norm > 0, grad / norm, 0.0)[None])
            self.sample_sums.append(sums.scaled(norm).of_task(task, len(self.weights)))
        return self.weights[task].to(grad.dtype) * grad

    def note(self, task: int, norm: Tensor) -> None:
        """Note the norm of the gradient of one task at one tensor."""
        self.tasks.add(task)
        self.norms.setdefault(task, []).append(norm)

    @property
    def read_one_tensor(self) -> bool:
        """Whether the head of every task has read one tensor."""
        return all(len(norms) == 1 for norms in self.norms.values())

    def joint_norms(self) -> Tensor:
        """Return the norms over all tensors, zero for an absent task. Shape ``(K,)``."""
        double = any(norm.dtype == torch.float64 for norms in self.norms.values() for norm in norms)
        like = self.known_norms.double() if double else self.known_norms
        return torch.stack([self._joint_norm(task, like) for task in range(len(like))])

    def _joint_norm(self, task: int, like: Tensor) -> Tensor:
        norms = [norm.to(like) for norm in self.norms.get(task, ())]
        if len(norms) > 1:
            return root_sum_square(torch.stack(norms))
        return norms[0] if norms else like.new_zeros(())


class Fork:
    """The point where one tensor goes to the heads, and where their gradients come back.

    Args:
        rep: The tensor z.
        num_tasks: K.
        running: Returns the backward pass that runs.

    Attributes:
        shape: The shape of z.
        version: How often z had been changed in place.
        made_by: The operation that made z, for those who ask why there are several.
        is_leaf: Whether z is a parameter.
        taps: How often z enters the heads of each task.
        rotated: Whether z is rotated on its way into them.
        second_moment: That of z, where the rotations are to turn by it. Shape ``(m, m)``.
        sketch: Projections of z, where agreement is measured.
        used: The tasks whose gradients came back in the latest backward pass in which they waited for each other.
    """

    def __init__(self, rep: Tensor, num_tasks: int, running: Callable[[], BackwardPass]) -> None:
        self.shape = rep.shape
        self.version = version(rep)
        self.made_by = "a leaf" if rep.grad_fn is None else rep.grad_fn.name().partition("Backward")[0]
        self.is_leaf = rep.is_leaf
        self.taps: Counter[int] = Counter()
        self.rotated = False
        self.second_moment: Tensor | None = None
        self.sketch: Sketch | None = None
        self.used: tuple[int, ...] = ()
        self._num_tasks = num_tasks
        self._running = running
        self._waiting: Tensor | None = None  # G, shape (K, *shape)
        self._arrived: set[int] = set()
        self._of: BackwardPass | None = None
        # A hook of the user's, as one that scales or clips the gradient at z, is for the sum of all.
        register_first_hook(rep, self._join)

    @property
    def tasks(self) -> Set[int]:
        """The tasks whose heads z enters."""
        return self.taps.keys()

    def _waits(self, this: BackwardPass) -> bool:
        """Whether gradients wait for each other: those of several tasks, or for one norm those of one task."""
        return not this.lagged or (this.meets and len(self.taps) > 1) or max(self.taps.values()) > 1

    def arrive(self, task: int, grad: Tensor) -> Tensor | None:
        """Return what of the gradient of ``task`` goes on to z now; None where nothing does.

        Autograd calls the hook on z only if something arrives there: the first gradient that waits is followed by one
        zero, which takes no memory.
        """
        this = self._running()
        if not self._waits(this):
            return this.pass_on(task, grad, self.sketch)
        if self._of is not this:  # a pass before has failed, and left something here
            self._waiting, self._arrived, self._of = None, set(), this
        first = self._waiting is None
        if self._waiting is None:
            self._waiting = grad.new_empty((self._num_tasks, *self.shape))
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
        self._waiting, self._arrived, self._of = None, set(), None
        this = self._running()
        if not this.lagged:  # else no gradient needs the others
            if self.used not in ((), tasks):
                raise RuntimeError(SPENT)
            self.used = tasks
        for task in set(range(len(grads))) - set(tasks):
            grads[task] = 0.0
        return grad + this.combine(this, grads, tasks, self).to(grad.dtype)


@dataclass
class Fed:
    """What the heads were fed since the latest backward pass.

    Attributes:
        tasks: Whether anything that entered its heads required grad, by task.
        forks: The forks of all tensors whose graphs are still there.
        addresses: Where the memory of everything begins that entered.
        num_sketches: Of how many tensors agreement is measured.
    """

    tasks: dict[int, bool] = field(default_factory=dict)
    forks: WeakSet[Fork] = field(default_factory=WeakSet)
    addresses: set[int] = field(default_factory=set)
    num_sketches: int = 0

    def note(self, rep: Tensor, task: int) -> None:
        """Note that ``rep`` enters the head of ``task``."""
        self.tasks[task] = self.tasks.get(task, False) or rep.requires_grad
        self.addresses.add(address(rep))

    def only_fork(self) -> Fork | None:
        """Return the fork of the only tensor that was fed and not used up yet; None if there are none or several."""
        unused = [fork for fork in self.forks if not fork.used]
        return unused[0] if len(unused) == 1 else None

    def trained(self) -> frozenset[int]:
        """Return the tasks whose heads were fed something that requires grad."""
        return frozenset(task for task, requires_grad in self.tasks.items() if requires_grad)

    def is_frozen(self, tasks: Iterable[int]) -> bool:
        """Whether the heads of ``tasks`` were fed, and nothing that requires grad."""
        return all(self.tasks.get(task) is False for task in tasks)

    def described(self, names: Sequence[str]) -> str:
        """Return what entered the heads of each task: shapes, and what made them."""
        found: dict[int, list[str]] = {}
        for fork in self.forks:
            for task in fork.tasks:
                found.setdefault(task, []).append(f"{tuple(fork.shape)} made by {fork.made_by}")
        return "; ".join(f"{names[task]}: {', '.join(sorted(found[task]))}" for task in sorted(found)) or "nothing"


def address(tensor: Tensor) -> int:
    """Return where the memory of ``tensor`` begins, by which a view is known; zero if it has no plain memory."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


class Rotate(torch.autograd.Function):
    """R_k z forward; backward, the gradient R_k^T g_k goes to the fork, in float32 or float64."""

    @staticmethod
    def forward(
        ctx: Any, rep: Tensor, matrix: Tensor | None, dims: RotatedDims, fork: Fork, key: tuple[int, Place]
    ) -> Tensor:
        """Return R_k z; z itself for a task that is not rotated."""
        ctx.save_for_backward(matrix)
        ctx.dims, ctx.fork, (ctx.task, ctx.place) = dims, fork, key
        # Detached, so that autograd takes it for no view, and a head may begin with an in-place ReLU.
        return rep.view_as(rep) if matrix is None else rotated(rep, matrix, dims).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Return what the fork lets pass."""
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_ORDER)
        (matrix,) = ctx.saved_tensors
        at_rep = plain(grad if grad.dtype == torch.float64 else grad.float())
        if matrix is not None:
            at_rep = rotated(at_rep, matrix.mT, ctx.dims)
        goes_on = ctx.fork.arrive(ctx.task, at_rep)
        return None if goes_on is None else goes_on.to(grad.dtype), None, None, None, None
