"""Capture: what enters a head is rotated, and what the heads were fed is noted."""

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
from rotoopt._torch.private import (
    backward_pass_id,
    is_transformed,
    keystr,
    not_compiled,
    tree_flatten_with_path,
    tree_unflatten,
    version,
)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# The place of a tensor among the inputs of a head: a path through arguments, lists and dicts. This one is z in head(z).
ONLY = "z"


class Capture:
    """Rotates what enters the heads, and captures the gradients on their way back.

    R_k rotates every tensor with gradient that enters head k and has the rotated size. Which places those are is noted
    in training, for evaluation.

    Args:
        rotations: The rotations to apply.
        dims: The dimensions to rotate.
        running: Returns the backward pass that runs, which gets the gradients.

    Attributes:
        handles: The handles of the hooks that feed the heads.
        fed: What the heads were fed since the latest backward pass; a new one, and the next forward pass begins.
        places: By task, the places of its tensors with gradient, and whether they are rotated.
        shapes: By task, the shape of what its head was fed latest in training, for heads that read one tensor.
    """

    def __init__(self, rotations: Rotations, dims: RotatedDims, running: Callable[[], BackwardPass]) -> None:
        self.rotations = rotations
        self.dims = dims
        self.handles: list[RemovableHandle] = []
        self.fed = Fed()
        self.places: list[dict[str, bool]] = [{} for _ in range(len(rotations))]
        self.shapes: dict[int, torch.Size] = {}
        self._paused = False
        self._running = running
        self._forks = WeakTensorKeyDictionary()
        self._changes_input: dict[tuple[int, str], bool] = {}  # whether a head changes what it gets there in place
        self._probes: dict[tuple[int, str], tuple[Tensor, int]] = {}  # what it got first, and how often that had changed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forks": None, "fed": None, "_probes": {}}

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

    def feed_all(self, args: tuple[Any, ...], kwargs: dict[str, Any], task: int, *, training: bool) -> Inputs:
        """Return the inputs of a module with every tensor among them fed, however deep in lists, tuples and dicts."""
        if len(args) == 1 and not kwargs and _is_floating(args[0]):
            return (self.feed(args[0], task, training=training, own=True),), kwargs
        pairs, structure = tree_flatten_with_path((args, kwargs))
        if not any(_is_floating(leaf) for _, leaf in pairs):
            found = ", ".join(str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for _, x in pairs)
            raise TypeError(
                "A floating-point tensor must enter a head, by position or keyword, alone or in lists, tuples and dicts, "
                f"got {found or 'no input'}. Objects of other classes are not looked into: for such inputs give "
                "num_tasks=K instead of `heads`, and feed the heads the tensors of optimizer.rotate(z)."
            )
        fed = [
            self.feed(leaf, task, keystr(path), training=training, own=True) if _is_floating(leaf) else leaf
            for path, leaf in pairs
        ]
        inputs: Inputs = tree_unflatten(fed, structure)
        return inputs

    def feed(
        self, rep: Tensor, task: int, place: str = ONLY, *, training: bool = True, own: bool = False
    ) -> Tensor:
        """Return R_k z, and capture its gradient if z is being trained.

        Args:
            rep: z, which enters head k.
            task: k.
            place: Its place among the inputs of the head.
            training: Whether the head trains.
            own: Whether the head may change what it gets in place, and must get a copy then.
        """
        captures = training and torch.is_grad_enabled()
        return (self._capture if captures else self._rotate)(rep, task, place, own)

    def _rotate(self, rep: Tensor, task: int, place: str, own: bool) -> Tensor:
        matrix = self._matrix_for(rep, task, place)
        if matrix is not None:
            return rotated(rep, matrix, self.dims)
        return rep.clone() if own and self._changes_input.get((task, place)) else rep

    @not_compiled
    def _capture(self, rep: Tensor, task: int, place: str, own: bool) -> Tensor:
        """Return R_k z and capture its gradient, unless no backward pass of ours can come.

        A graph break: a fork is filled in the backward pass, where torch.compile cannot follow.
        """
        if self._paused or is_transformed():
            return self._rotate(rep, task, place, own)
        self.fed.tasks[task] = self.fed.tasks.get(task, False) or rep.requires_grad
        if not rep.requires_grad:
            return self._rotate(rep, task, place, own)
        matrix = self._matrix_for(rep, task, place, note=True)
        fork = self._fork(rep)
        fork.tasks.add(task)
        fork.rotated = fork.rotated or matrix is not None
        if place == ONLY:
            self.shapes[task] = rep.shape
        out: Tensor = Rotate.apply(rep, matrix, self.dims, fork, task)  # type: ignore[no-untyped-call]
        return self._own_copy(out, (task, place)) if own and matrix is None else out

    def _own_copy(self, out: Tensor, key: tuple[int, str]) -> Tensor:
        """Return a copy for a head that changes what it gets in place, else ``out``; the first time, look which it is."""
        if key not in self._changes_input and key in self._probes:
            probe, count = self._probes.pop(key)
            self._changes_input[key] = version(probe) > count
        if self._changes_input.get(key) is False:
            return out
        copy = out.clone()
        if key not in self._changes_input:
            self._probes[key] = copy.detach(), version(copy)  # which share the count of changes
        return copy

    def _fork(self, rep: Tensor) -> Fork:
        fork: Fork | None = self._forks.get(rep)  # type: ignore[no-untyped-call]
        if fork is None:
            # Checkpointing makes graphs inside backward. A leaf there is a copy, cut off from the rest of its graph.
            if backward_pass_id() != -1 and rep.is_leaf:
                raise RuntimeError(
                    "A head must get the representation itself, got a detached copy that was made inside backward. "
                    "Likely cause: re-entrant checkpointing around a head; pass use_reentrant=False to checkpoint()."
                )
            fork = self._forks[rep] = Fork(rep, len(self.rotations), self._running)
            self.fed.forks.add(fork)
        elif rep.is_leaf and fork.used:  # z is a parameter, the same tensor in every forward pass
            fork.used = ()
            self.fed.forks.add(fork)
        return fork

    def _matrix_for(self, rep: Tensor, task: int, place: str, *, note: bool = False) -> Tensor | None:
        """Return R_k if this tensor is rotated, None if not; ``note`` it, for evaluation."""
        if not self.rotations.rotate[task]:
            return None
        fits = self.places[task].get(place)
        if fits is None and (note or place == ONLY):
            fits = self._fits(rep)
            if note:
                self.places[task][place] = fits
        elif fits and not self._fits(rep):
            raise ValueError(self._misfit(rep))
        if not fits:
            return None
        if self.rotations.size is None or rep.device != self.rotations.device:
            self._settle(self.dims.size(rep), rep.device)
        return self.rotations[task]

    def _fits(self, rep: Tensor) -> bool:
        """Whether ``rep`` has the size of the rotations. The first tensor must have it, or decides about it."""
        d, m = self.dims.size(rep), self.rotations.size
        fits = m is None or (d == m if self.rotations.covers_all else d >= m)
        if not fits and not any(any(places.values()) for places in self.places):
            raise ValueError(self._misfit(rep))
        return fits

    def _misfit(self, rep: Tensor) -> str:
        m = self.rotations.size
        rule = f"have {m} features" if self.rotations.covers_all else f"have at least rotation_size={m} features"
        return (
            f"The representation must {rule} along dim={self.dims.dim}, got {self.dims.size(rep)} in shape "
            f"{tuple(rep.shape)}. Either (a) `dim` names the wrong dimension, (b) the head was fed something else than "
            "the representation, or (c) its size changes between batches: rotate a dimension that does not."
        )

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


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
