"""Capture: rotates the inputs of the heads, and keeps track of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from rotoopt._capture.agreement import Sketch
from rotoopt._capture.backward_pass import BackwardPass
from rotoopt._capture.dependence import tasks_behind
from rotoopt._capture.fed import Fed
from rotoopt._capture.first_weight import FirstWeight
from rotoopt._capture.fork import Fork, Rotate, Turn
from rotoopt._capture.graph import made_by, parameters_of
from rotoopt._capture.in_place import InPlaceHeads, copied
from rotoopt._capture.inputs import Inputs, is_floating, paths_and_leaves, rebuilt
from rotoopt._capture.latest import LatestWeights
from rotoopt._capture.owner import Owner
from rotoopt._capture.paths import Arguments, Path, Z
from rotoopt._capture.places import Place, Places
from rotoopt._capture.representation import RotatedDims, rotated, second_moment
from rotoopt._capture.whereabouts import Whereabouts
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.private import backward_pass_id, is_transformed, not_compiled, version
from rotoopt._torch.subclasses import plain, with_attributes_of


class Capture:
    """Rotates the inputs of the heads, and captures their gradients in the backward pass.

    Args:
        rotations: The rotations to apply.
        dims: The dimensions to rotate.
        running: Returns the current backward pass, which receives the gradients.
        measures: Returns whether the current step needs second moments of rotated tensors.
        seed: Returns the seed of the projections if the current step measures the agreement; otherwise None.
        are_own: Returns whether parameters belong to a task alone.

    Attributes:
        handles: The handles of the hooks of the heads.
        fed: The inputs of the heads since the latest backward pass; replaced before the next forward pass.
        places: Which of the tensors that enter the heads are rotated.
        whereabouts: Whether the rotations are those of the weights behind them.
        latest_weights: Whether evaluated weights are those of the latest step.
        shapes: Latest shapes of the inputs in training, by task and place.
        inside: Tasks and places of inputs that a head computes itself, as in a decoder that calls it at every position.
        owner: The owner of the gradients; None for a module that calls the heads itself.
        replaced: Whether a later optimizer has taken over heads.
        removed: Whether the hooks were removed from the heads.
    """

    def __init__(
        self,
        rotations: Rotations,
        dims: RotatedDims,
        running: Callable[[], BackwardPass],
        measures: Callable[[], bool],
        seed: Callable[[], int | None],
        are_own: Callable[[Iterable[Tensor], int], bool],
    ) -> None:
        self.rotations = rotations
        self.dims = dims
        self.handles: list[RemovableHandle] = []
        self.fed = Fed()
        self.places = Places(rotations, dims)
        self.whereabouts = Whereabouts(rotations, self.places)
        self.latest_weights = LatestWeights(rotations)
        self.shapes: dict[tuple[int, Place], torch.Size] = {}
        self.inside: set[tuple[int, Place]] = set()
        self.owner: Owner | None = None
        self.replaced = self.removed = False
        self._paused = False
        self._running = running
        self._measures = measures
        self._seed = seed
        self._are_own = are_own
        self._forks = WeakTensorKeyDictionary()
        self.in_place = InPlaceHeads()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forks": None, "fed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Forks belong to a graph, which cannot be copied.
        self.__dict__.update(state, _forks=WeakTensorKeyDictionary(), fed=Fed())

    def detach(self) -> None:
        """Remove every hook."""
        self.removed = self.removed or bool(self.handles)
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def check_current(self) -> None:
        """Raise if a later optimizer has taken over heads: it weights their gradients."""
        if self.replaced:
            raise RuntimeError(
                "The latest RotoGradOptimizer of the heads must be used, got one that a later one has replaced, as "
                "when a notebook cell runs again: its weights and rotations no longer change. Give the later one to "
                "everything that keeps this one, such as a trainer or a training function."
            )

    def check_attached(self) -> None:
        """Raise if there is nothing in front of the heads that weights gradients."""
        self.check_current()
        if self.removed:
            raise RuntimeError(
                "Losses must be given before remove() or fold(), got some afterwards: gradients are no longer "
                "weighted. Either (a) build a new RotoGradOptimizer, or (b) call sum(losses).backward() and "
                "optimizer.optimizer.step(), which trains without weights."
            )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Rotate without capturing: gradients are those of the rotated model."""
        self.check_current()
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def feed_all(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        task: int,
        part: int,
        arguments: Arguments,
        *,
        training: bool,
    ) -> Inputs:
        """Return the inputs of a module, with all tensors in nested lists, tuples and dicts processed.

        Args:
            args: Positional inputs.
            kwargs: Keyword inputs.
            task: k.
            part: Number of the module among those of task k.
            arguments: Names of its arguments.
            training: Whether it is in training mode.
        """
        captures = training and torch.is_grad_enabled()
        feed = self._capture_each if captures else self._feed_each
        return feed((args, kwargs), task, part, arguments, captures)

    def _feed_each(self, inputs: Inputs, task: int, part: int, arguments: Arguments, captures: bool) -> Inputs:
        pairs = paths_and_leaves(inputs, arguments)
        num_floating = sum([is_floating(leaf) for _, leaf in pairs])
        if not num_floating and self._looks_up(pairs, task):
            return inputs
        if not num_floating:
            found = ", ".join(str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for _, x in pairs)
            raise TypeError(
                "A floating-point tensor must enter a head, by position or keyword, alone or in lists, tuples and "
                f"dicts, got {found or 'no input'}. Objects of other classes are not searched: list the "
                "modules inside of the head that get tensors, or pass num_tasks=K instead of `heads`, and call the "
                "heads on the tensors of optimizer.rotate(z). Pass list(...) of an iterator, and torch.view_as_real(z) "
                "of a complex z. Before torch.fx traces a model, call optimizer.fold()."
            )
        paths = self.places.as_in_training(pairs, task, part, trains=captures)
        fed: list[Any] = []
        for i, (path, (_, leaf)) in enumerate(zip(paths, pairs, strict=True)):
            # A tensor that enters several times, as in mha(z, z, z), has one gradient.
            same = next((j for j in range(i) if pairs[j][1] is leaf and is_floating(leaf)), None)
            if same is not None:
                if captures:
                    self.places.note_same((part, path), (part, paths[same]), task)
                fed.append(fed[same])
            elif is_floating(leaf):
                alone = num_floating == 1
                fed.append(self.feed(leaf, task, (part, path), alone=alone, training=captures, own=True))
            else:
                fed.append(leaf)
        return rebuilt(inputs, fed)

    def _looks_up(self, pairs: list[tuple[Path, Any]], task: int) -> bool:
        """Whether a module that a task has beside others gets indices alone, as an embedding does."""
        several = sum([other == task for other, _ in self.whereabouts.heads]) > 1
        return several and all([isinstance(leaf, Tensor) and not leaf.is_complex() for _, leaf in pairs])  # noqa: C419

    _capture_each = not_compiled(_feed_each)  # one graph break for all

    def feed(
        self,
        rep: Tensor,
        task: int,
        place: Place = (0, Z),
        first: FirstWeight | None = None,
        *,
        alone: bool = True,
        training: bool = True,
        own: bool = False,
    ) -> Tensor:
        """Return R_k z, and capture its gradient in training.

        Args:
            rep: z, which enters head k.
            task: k.
            place: Where it enters.
            first: The weight that may be rotated instead.
            alone: Whether no other floating-point tensor enters.
            training: Whether the head is in training mode.
            own: Whether the head may change its input in place, and must then get a copy.
        """
        if rep.layout != torch.strided or rep.is_nested:
            return self._not_dense(rep, task, place)
        if training and torch.is_grad_enabled():
            return self._capture(rep, task, place, first, alone, own)
        return self._rotate(rep, task, place, alone, own)

    def _not_dense(self, rep: Tensor, task: int, place: Place) -> Tensor:
        """Accept ``rep``, such as the adjacency matrix of a graph; raise if it would have to be rotated or measured."""
        if rep.requires_grad or self.places.noted[task].get(place):
            kind = "a nested tensor" if rep.is_nested else f"one of layout {rep.layout}"
            raise TypeError(
                f"The representation must be a dense tensor, got {kind}. Give the heads its values or a padded one: "
                "z.values() of a nested or sparse tensor, torch.nested.to_padded_tensor(z, 0.0), z.to_dense()."
            )
        return rep

    def _rotate(self, rep: Tensor, task: int, place: Place, alone: bool, own: bool) -> Tensor:
        matrix = self.places.matrix_for(rep, task, place, alone=alone, trains=False)
        if matrix is not None:
            return with_attributes_of(rep, rotated(rep, matrix, self.dims))
        may_be_z = alone or (task, place) in self.shapes  # apparently neither a mask nor a condition
        copies = own and may_be_z and self.in_place.may_change((task, place))
        return with_attributes_of(rep, copied(rep)) if copies else rep

    @not_compiled
    def _capture(
        self, rep: Tensor, task: int, place: Place, first: FirstWeight | None, alone: bool, own: bool
    ) -> Tensor:
        """Return R_k z and capture its gradient, unless no backward pass of this optimizer can follow.

        A graph break: a fork is filled in the backward pass, which torch.compile cannot trace.
        """
        if is_transformed():
            return self._rotate(rep, task, place, alone, own)
        out = self._captured(rep, task, place, first, alone, own)
        return with_attributes_of(rep, out) if vars(rep) else out

    def _captured(
        self, rep: Tensor, task: int, place: Place, first: FirstWeight | None, alone: bool, own: bool
    ) -> Tensor:
        key = task, place
        if key in self.inside or (key not in self.shapes and self._begins_inside(rep, key)):
            self.places.noted[task][place] = False
            return rep
        if self._is_beside_frozen(rep, key):
            self.places.noted[task].setdefault(place, None)
            return rep
        matrix = self.places.matrix_for(rep, task, place, alone=alone, trains=True)
        own_place = not self._paused and key in self.places.own
        if own_place and not self._are_own(parameters_of(rep), task):  # the backbone was frozen, but is no longer
            self.places.own.discard(key)
            own_place = False
        unowned = self.owner is not None and self.owner.is_gone
        let_pass = self._paused or unowned or own_place  # with the true gradient
        if own_place:
            self.fed.tasks.setdefault(task, False)
        elif not let_pass:
            self.fed.note(rep, task, place)
        if let_pass and rep.requires_grad and matrix is not None:
            if first is not None and not self._measures() and first.can_rotate(rep, matrix, self.dims):
                return first.defer(rep, matrix)  # as below, where a checkpoint may compute it again
            turned: Tensor = Turn.apply(rep, matrix, self.dims, task)  # type: ignore[no-untyped-call]
            return turned
        if let_pass or not rep.requires_grad:
            if alone and matrix is not None:  # of a frozen z, for fold()
                self.shapes[key] = rep.shape
            out = rep if matrix is None else rotated(rep, matrix, self.dims)
            own = own and matrix is None and (alone or key in self.shapes)
            return self.in_place.own_copy(out, key) if own else out
        fork = self._fork(rep)
        fork.enter(task)
        self.shapes[key] = rep.shape
        if matrix is not None:
            measures = self._measures()
            if measures and not fork.rotated:
                fork.second_moment = second_moment(plain(rep), matrix, self.dims)
            fork.rotated = True
            # When rotations are updated, R^T g is written to where the gradients meet, without a copy.
            if first is not None and not measures and first.can_rotate(rep, matrix, self.dims):
                return first.defer(Rotate.apply(rep, None, fork, key), matrix)  # type: ignore[no-untyped-call]
        out = Rotate.apply(rep, matrix, fork, key)  # type: ignore[no-untyped-call]
        return self.in_place.own_copy(out, key) if own and matrix is None else out

    def _begins_inside(self, rep: Tensor, key: tuple[int, Place]) -> bool:
        """Whether the head has computed ``rep`` itself, so that its gradient is weighted further back in the graph.

        Decided when the first gradient is expected at a place; the wiring check finds out if that changes. Until then,
        the first forward pass under :meth:`pause` decides.
        """
        task, place = key
        is_undecided = place not in self.places.noted[task] if self._paused else self.fed.tasks.get(task)
        if not is_undecided or tasks_behind(made_by(rep), self._are_own, paused=self._paused) != {task}:
            return False
        if not self._paused:
            self.inside.add(key)
        return True

    def _is_beside_frozen(self, rep: Tensor, key: tuple[int, Place]) -> bool:
        """Whether the head has read a frozen representation, and ``rep`` was computed from its own parameters.

        Apparently the head has computed it itself, without a tap behind it: there is nothing to rotate or weight.
        """
        task, place = key
        if self._paused or self.fed.tasks.get(task) is not False or self.places.noted[task].get(place):
            return False
        return rep.requires_grad and key not in self.shapes and self._are_own(parameters_of(rep), task)

    def _fork(self, rep: Tensor) -> Fork:
        fork: Fork | None = self._forks.get(rep)  # type: ignore[no-untyped-call]
        # A tensor that was changed in place since is another one, computed by another operation.
        if fork is None or (fork.version != version(rep) and not rep.is_leaf):
            # Checkpointing builds graphs in the backward pass. A leaf there is a copy without the rest of its graph.
            if backward_pass_id() != -1 and rep.is_leaf:
                raise RuntimeError(
                    "A head must get the representation itself, got a detached copy from inside a backward pass. "
                    "Likely cause: re-entrant checkpointing around a head; pass use_reentrant=False to checkpoint()."
                )
            fork = self._forks[rep] = Fork(rep, self.dims, len(self.rotations), self._running, self._sketch(rep))
        # z is a parameter, the same tensor in every forward pass.
        elif rep.is_leaf and (fork.reached or fork.version != version(rep)) and backward_pass_id() == -1:
            fork.renew(rep, self._sketch(rep))
        self.fed.add(fork, rep)
        return fork

    def _sketch(self, rep: Tensor) -> Sketch | None:
        """Return projections of ``rep`` if the agreement is measured in this step and there are several samples."""
        seed = self._seed()
        if seed is None or rep.ndim < 2 or not self.dims.exist_in(rep.shape):
            return None
        if len(rep) < 2 or 0 in self.dims.resolve(rep.shape):
            return None
        # One seed for all tensors, so that a batch per task is measured like one batch with all of them.
        return Sketch(plain(rep), self.dims, seed)
