"""Capture: representations are rotated on their way into the heads, and what the heads were fed is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from rotoopt._capture.fork import BackwardPass, Fed, Fork, Rotate
from rotoopt._capture.representation import RotatedDims, rotated
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.private import backward_pass_id, is_transformed, not_compiled


class Capture:
    """Rotates representations on their way into the heads, and captures the gradients on their way back.

    Args:
        rotations: The rotations to apply.
        dims: The dimensions to rotate.
        running: Returns the backward pass that runs, which gets the gradients.

    Attributes:
        handles: The handles of the hooks that feed the heads.
        fed: What the heads were fed since the latest backward pass; a new one, and the next forward pass begins.
        last_shape: The shape of the latest representation that was fed in training.
    """

    def __init__(self, rotations: Rotations, dims: RotatedDims, running: Callable[[], BackwardPass]) -> None:
        self.rotations = rotations
        self.dims = dims
        self.handles: list[RemovableHandle] = []
        self.fed = Fed()
        self.last_shape: torch.Size | None = None
        self._paused = False
        self._running = running
        self._forks = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forks": None, "fed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Forks belong to a graph, not to a copy.
        self.__dict__.update(state, _forks=WeakTensorKeyDictionary(), fed=Fed())

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Rotate without capturing: gradients are those of the rotated model."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def feed(self, rep: Tensor, task: int, *, training: bool = True) -> Tensor:
        """Return R_k z, and capture its gradient if z is being trained."""
        return (self._capture if training and torch.is_grad_enabled() else self._rotate)(rep, task)

    def _rotate(self, rep: Tensor, task: int) -> Tensor:
        matrix = self._matrix_for(rep, task)
        return rep if matrix is None else rotated(rep, matrix, self.dims)

    @not_compiled
    def _capture(self, rep: Tensor, task: int) -> Tensor:
        """Return R_k z and capture its gradient, unless no backward pass of ours can come.

        A graph break: a fork is filled in the backward pass, where torch.compile cannot follow.
        """
        if self._paused or is_transformed():
            return self._rotate(rep, task)
        matrix = self._matrix_for(rep, task)
        self.last_shape = rep.shape
        self.fed.tasks[task] = rep.requires_grad
        if not rep.requires_grad:
            return self._rotate(rep, task)
        out: Tensor = Rotate.apply(rep, matrix, self.dims, self._fork(rep), task)  # type: ignore[no-untyped-call]
        return out

    def _fork(self, rep: Tensor) -> Fork:
        fork: Fork | None = self._forks.get(rep)  # type: ignore[no-untyped-call]
        if fork is None:
            # Checkpointing makes graphs inside backward. A leaf there is a copy, cut off from the rest of its graph.
            if backward_pass_id() != -1 and rep.is_leaf:
                raise RuntimeError(
                    "A head must get the representation itself, got a detached copy that was made inside backward. "
                    "Likely cause: re-entrant checkpointing around a head; pass use_reentrant=False to checkpoint()."
                )
            fork = self._forks[rep] = Fork(rep, len(self.rotations), self.dims, self._running)
            self.fed.forks.add(fork)
        elif rep.is_leaf and fork.joined:  # z is a parameter, the same tensor in every forward pass
            fork.joined = ()
            self.fed.forks.add(fork)
        return fork

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

    @not_compiled
    def _settle(self, size: int, device: torch.device) -> None:
        """Make the rotations at the first representation; follow a model that was moved."""
        if is_transformed():
            raise RuntimeError(
                "The rotations must exist on the device of the model before it is exported, traced or transformed by "
                "torch.func, got none there. They are made, or moved, when the model runs: run it once before."
            )
        with torch.inference_mode(False):  # a check before training may be the first forward pass
            self.rotations.to(device)
            if self.rotations.size is None:
                self.rotations.create(size)
