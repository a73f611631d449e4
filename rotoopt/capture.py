"""Capture: the rotation in front of every head, and each task's gradient at the representation behind it.

In the forward pass a hook on head k replaces the representation z by R_k z. In the backward pass the gradient of
task k at z, R_k^T g_k, is set aside instead of being added to that of the other tasks; when all have arrived, a
hook on z hands on what :class:`Homogenizer` makes of them. So one ordinary ``sum(losses).backward()`` does it all,
and everything that works with an ordinary backward (DDP, checkpointing, compile) goes on working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from rotoopt.representation import RotatedDims, apply_rotation
from rotoopt.rotations import Rotations

# What becomes of the K gradients (K, *shape) of the given tasks: one gradient (*shape).
Receiver = Callable[[Tensor, tuple[int, ...], RotatedDims], Tensor]

SPENT = (
    "The losses of one forward pass must be back-propagated together and once, got a second backward pass. Either (a) "
    "step(losses) or backward(losses) came after your own sum(losses).backward(), which it replaces, or (b) every "
    "task has a backward() or torch.autograd.grad() of its own: the gradients of single tasks are in "
    "optimizer.last_step."
)


class Fork:
    """The point where one representation goes to its heads, and where their gradients meet again."""

    def __init__(self, rep: Tensor, num_tasks: int, dims: RotatedDims, receive: Receiver) -> None:
        self._shape = (num_tasks, *rep.shape)
        self._dims = dims
        self._receive = receive
        self._grads: Tensor | None = None
        self._arrived: set[int] = set()
        self.joined: tuple[int, ...] = ()  # the tasks of the latest backward pass

    def add(self, task: int, grad: Tensor) -> bool:
        """Set the gradient of one task aside; return whether it is the first of this backward pass."""
        first = self._grads is None
        if self._grads is None:
            self._grads = grad.new_empty(self._shape)
        if task in self._arrived:  # a head that was called twice
            self._grads[task] += grad
        else:
            self._grads[task] = grad
        self._arrived.add(task)
        return first

    def join(self, grad: Tensor) -> Tensor:
        """Add the combination of the task gradients to ``grad``, what all other uses of z contribute."""
        if self._grads is None:
            return grad
        grads, tasks = self._grads, tuple(sorted(self._arrived))
        self._grads, self._arrived = None, set()
        if self.joined not in ((), tasks):
            raise RuntimeError(SPENT)
        self.joined = tasks
        for task in set(range(len(grads))) - set(tasks):
            grads[task] = 0.0
        combined = self._receive(grads, tasks, self._dims)
        return grad + combined.to(grad.dtype)


class Rotate(torch.autograd.Function):
    """R_k z forward; backward, the gradient R_k^T g_k goes to the fork and not to z."""

    @staticmethod
    def forward(
        ctx: Any,
        rep: Tensor,
        matrix: Tensor | None,
        dims: RotatedDims,
        fork: Fork,
        task: int,
    ) -> Tensor:
        """Return R_k z; z itself, as a view, for a task that is not rotated."""
        ctx.save_for_backward(matrix)
        ctx.dims, ctx.fork, ctx.task = dims, fork, task
        # Detached, so that autograd takes it for no view, and a head may begin with an in-place ReLU.
        return rep.view_as(rep) if matrix is None else rotated(rep, matrix, dims).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Hand R_k^T g_k to the fork, in float32 or float64."""
        (matrix,) = ctx.saved_tensors
        at_rep = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if matrix is not None:
            at_rep = rotated(at_rep, matrix.mT, ctx.dims)
        if not ctx.fork.add(ctx.task, at_rep):
            return None, None, None, None, None
        # Autograd calls the hook on z only if something arrives there: one zero, that takes no memory.
        return grad.new_zeros(()).expand(grad.shape), None, None, None, None


def rotated(rep: Tensor, matrix: Tensor, dims: RotatedDims) -> Tensor:
    """Return the rotation of ``rep``, in its dtype, outside autocast."""
    with torch.autocast(rep.device.type, enabled=False):
        return dims.restore(apply_rotation(matrix.to(rep.dtype), dims.view(rep)), rep)


def _is_transformed() -> bool:
    """Whether the model is being exported, traced or transformed by torch.func, and not trained."""
    exported = torch.compiler.is_exporting() or torch._C._is_tracing()
    return exported or torch._C._are_functorch_transforms_active()


class Capture:
    """Rotates representations on their way into the heads, and captures the gradients on their way back.

    Args:
        rotations: The rotations to apply.
        dims: The dimensions to rotate.
        receive: Called in the backward pass with the gradients ``(K, *shape)``, the tasks that are present and
            ``dims``; returns the gradient for the representation.
    """

    def __init__(self, rotations: Rotations, dims: RotatedDims, receive: Receiver) -> None:
        self.rotations = rotations
        self.dims = dims
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.paused = False
        self.last_shape: torch.Size | None = None  # of the latest representation that was fed in training
        self._receive = receive
        self._forks = WeakTensorKeyDictionary()
        self._latest_pass: tuple[int, tuple[int, ...]] = (-1, ())  # number of a backward pass, and its tasks
        self.start_over()

    def start_over(self) -> None:
        """Forget which heads were fed: the next forward pass begins."""
        self._fed: dict[int, bool] = {}  # by task, whether its representation required grad
        self._num_forks = 0
        self._num_joined = 0

    def looks_complete(self, tasks: Iterable[int]) -> bool:
        """Whether one representation was fed since :meth:`start_over`, to all of ``tasks``, and not used up yet."""
        return self._num_forks == 1 and self._num_joined == 0 and all(self._fed.get(task) for task in tasks)

    def is_frozen(self, tasks: Iterable[int]) -> bool:
        """Whether all of ``tasks`` were fed a representation that does not require grad."""
        return all(self._fed.get(task) is False for task in tasks)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forks": None, "_latest_pass": (-1, ())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _forks=WeakTensorKeyDictionary())  # forks belong to a graph, not to a copy

    def attach(self, head: nn.Module, task: int) -> None:
        """Put rotation ``task`` in front of ``head``."""
        # First of all hooks: wrappers such as FSDP's hand every head a tensor of its own, which is no longer z.
        hook = HeadHook(self, task)
        self.handles.append(head.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Rotate without capturing: gradients are those of the rotated model."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def feed(self, rep: Tensor, task: int, *, training: bool = True) -> Tensor:
        """Return R_k z, and capture its gradient if z is being trained."""
        out: Tensor = (self._capture if training and torch.is_grad_enabled() else self._rotate)(rep, task)
        return out

    def _rotate(self, rep: Tensor, task: int) -> Tensor:
        matrix = self._matrix_for(rep, task)
        return rep if matrix is None else rotated(rep, matrix, self.dims)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _capture(self, rep: Tensor, task: int) -> Tensor:
        """Return R_k z and capture its gradient, unless no backward pass of ours can come.

        A graph break: a fork is filled in the backward pass, where torch.compile cannot follow.
        """
        if self.paused or _is_transformed():
            return self._rotate(rep, task)
        matrix = self._matrix_for(rep, task)
        self.last_shape = rep.shape
        self._fed[task] = rep.requires_grad
        if not rep.requires_grad:
            return self._rotate(rep, task)
        out: Tensor = Rotate.apply(rep, matrix, self.dims, self._fork(rep), task)  # type: ignore[no-untyped-call]
        return out

    def _fork(self, rep: Tensor) -> Fork:
        fork: Fork | None = self._forks.get(rep)  # type: ignore[no-untyped-call]
        if fork is None:
            # Checkpointing makes graphs inside backward. A leaf there is a copy, cut off from the rest of its graph.
            if torch._C._current_graph_task_id() != -1 and rep.is_leaf:
                raise RuntimeError(
                    "A head must get the representation itself, got a detached copy that was made inside backward. "
                    "Likely cause: re-entrant checkpointing around a head; pass use_reentrant=False to checkpoint()."
                )
            fork = Fork(rep, len(self.rotations), self.dims, self._join)
            rep.register_hook(fork.join)  # type: ignore[no-untyped-call]
            self._num_forks += 1
            self._forks[rep] = fork
        elif rep.is_leaf and fork.joined:  # z is a parameter, the same tensor in every forward pass
            fork.joined = ()
            self._num_forks += 1
        return fork

    def _join(self, grads: Tensor, tasks: tuple[int, ...], dims: RotatedDims) -> Tensor:
        """Hand the gradients at one representation on."""
        this_pass = torch._C._current_graph_task_id()
        latest, others = self._latest_pass
        if this_pass == latest != -1 and not set(tasks) & set(others):
            raise RuntimeError(
                "All heads must get the same representation tensor, got two tensors, each for tasks of its own, in "
                "one backward pass. Likely causes: (a) a head is fed a view or a copy, as in head(z.flatten(1)): "
                "reshape once, before the first head, or (b) the tasks use different batches: give them in separate "
                "backward passes."
            )
        self._latest_pass = this_pass, tasks
        self._num_joined += 1
        return self._receive(grads, tasks, dims)

    def _matrix_for(self, rep: Tensor, task: int) -> Tensor | None:
        """Check ``rep`` and return R_k, or None for a task that is not rotated."""
        if not isinstance(rep, Tensor) or not rep.is_floating_point():
            found = rep.dtype if isinstance(rep, Tensor) else type(rep).__name__
            raise TypeError(f"The representation must be a floating-point tensor, got {found}.")
        d, m = self.dims.size(rep), self.rotations.size
        if m is not None and (d != m if self.rotations.covers_all else d < m):
            rule = f"have {m} features" if self.rotations.covers_all else f"have at least rotation_size={m} features"
            raise ValueError(
                f"The representation must {rule} along dim={self.dims.dim}, got {d} in shape {tuple(rep.shape)}. "
                "Either (a) `dim` names the wrong dimension, (b) the head was fed something else than the "
                "representation, or (c) its size changes between batches: rotate a dimension that does not."
            )
        if m is None or rep.device != self.rotations.device:
            self._settle(d, rep.device)
        return self.rotations[task] if self.rotations.rotate[task] else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self, size: int, device: torch.device) -> None:
        """Make the rotations at the first representation; follow a model that was moved."""
        if _is_transformed():
            raise RuntimeError(
                "The rotations must exist on the device of the model before it is exported, traced or transformed by "
                "torch.func, got none there. They are made, or moved, when the model runs: run it once before."
            )
        with torch.inference_mode(False):  # a check before training may be the first forward pass
            self.rotations.to(device)
            if self.rotations.size is None:
                self.rotations.create(size)


class HeadHook:
    """Forward pre-hook of one head: replaces the representation by its rotation."""

    def __init__(self, capture: Capture, task: int) -> None:
        self.capture = capture
        self.task = task

    def __call__(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rotate the first positional argument, or else the first keyword argument."""
        if args:
            return (self._rotate(head, args[0]), *args[1:]), kwargs
        if kwargs:
            name = next(iter(kwargs))
            return args, {**kwargs, name: self._rotate(head, kwargs[name])}
        return args, kwargs

    def _rotate(self, head: nn.Module, rep: object) -> Tensor:
        if not isinstance(rep, Tensor):
            raise TypeError(
                f"The first input of a head must be the representation, a tensor, got {type(rep).__name__}. "
                "For other inputs give num_tasks=K instead of `heads` and feed the heads the tensors of "
                "optimizer.rotate(z)."
            )
        return self.capture.feed(rep, self.task, training=head.training)
