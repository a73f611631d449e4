"""Places: which of the tensors that enter the heads are rotated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotoopt._capture.first_layer import FirstLayer
from rotoopt._capture.paths import Path, as_in_training, siblings
from rotoopt._capture.representation import RotatedDims
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.private import backward_pass_id, is_transformed, not_compiled, version
from rotoopt._torch.warn import warn_user

if TYPE_CHECKING:
    from rotoopt._capture.fork import Fork

LARGE = 4096  # features: a rotation of 64 MiB
# Number of a module of a task, and a path through its arguments, lists and dicts.
Place = tuple[int, Path]


class Places:
    """Which of the tensors that enter the heads are rotated: those of the size of the rotations.

    This is decided in training, when a tensor enters with a gradient, and holds in evaluation. An input that a head
    has read without a gradient, and so without rotation, stays so if it gets a gradient after updates of the rotations.

    Args:
        rotations: The K rotations.
        dims: The rotated dimensions.

    Attributes:
        noted: By task, the known places, and whether they are rotated; None if there was no gradient yet.
        first_layers: The first layers of the modules of heads, by task and number; None if unknown.
        own: Tasks and places of inputs that were computed from parameters of the task alone, such as an embedding.
    """

    def __init__(self, rotations: Rotations, dims: RotatedDims) -> None:
        self._rotations = rotations
        self._dims = dims
        self.first_layers: dict[tuple[int, int], FirstLayer | None] = {}
        self.own: set[tuple[int, Place]] = set()
        self._proposed: int | None = None
        self._sizes: dict[tuple[int, Place], int] = {}  # of inputs with a gradient, by task and place
        self._frozen_sizes: dict[tuple[int, Place], int] = {}  # of others, which count while there are none
        self._fresh: int | None = None  # version of the rotations when the first z determined their size
        self._warned = False
        self.noted: list[dict[Place, bool | None]] = [{} for _ in range(len(rotations))]

    def matrix_for(self, rep: Tensor, task: int, place: Place, *, alone: bool, trains: bool) -> Tensor | None:
        """Return R_k if ``rep`` is rotated, otherwise None; create the rotations at the first representation.

        Args:
            rep: The input of the head.
            task: k.
            place: Where it enters.
            alone: Whether no other floating-point tensor enters.
            trains: Whether the head is in training mode, so that the decision for this place is stored.
        """
        if not self._rotations.rotate[task]:
            if not any(self._rotations.rotate):
                self._rest(rep)
            return None
        noted = self.noted[task]
        fits = noted.get(place)
        if fits is None:
            self._check_dim(rep, task, place, alone=alone)
        # Not in a backward pass, in which checkpointing reruns heads: they must compute the same as before.
        if fits is None and trains and rep.requires_grad and backward_pass_id() == -1:
            fits = self._fits(rep, alone=alone) if not self._was_unrotated(task, place) else False
            if fits is not None:
                noted[place] = fits
            fits = self._with_the_most(rep, task, place)
        elif fits is None and place not in noted:
            fits = self._fits(rep, alone=alone) if alone else None
            if trains:
                noted[place] = fits or None
                fits = self._with_the_most(rep, task, place) if alone else None
        elif fits and self._rotations.size is not None and not self._has_size(rep):
            raise ValueError(self._misfit(rep))
        elif fits and self._fresh is not None and trains and rep.requires_grad:  # after steps with a frozen backbone
            fits = self._with_the_most(rep, task, place)
        if not fits:
            return None
        if self._rotations.size is None:
            self._settle(self._dims.size(rep.shape), rep.device)
        matrix = self._rotations[task]
        if matrix.device != rep.device:
            self._settle(self._dims.size(rep.shape), rep.device)
            matrix = self._rotations[task]
        return matrix

    @not_compiled
    def _with_the_most(self, rep: Tensor, task: int, place: Place) -> bool | None:
        """Return whether ``rep`` is rotated, after replacing the size of the first head by the most frequent one."""
        noted, m = self.noted, self._rotations.size
        if not self._rotations.covers_all or not self._dims.exist_in(rep.shape):
            return noted[task].get(place)
        sizes = self._sizes if rep.requires_grad else self._frozen_sizes
        sizes[task, place] = self._dims.size(rep.shape)
        if self._sizes and not rep.requires_grad:
            return noted[task].get(place)
        readers: dict[int, set[int]] = {}
        for (reader, _), size in sizes.items():
            readers.setdefault(size, set()).add(reader)
        most = max(readers, key=lambda size: len(readers[size]))
        if m is None and noted[task].get(place) and len(readers[most]) > len(readers[sizes[task, place]]):
            del noted[task][place]  # more heads have read another size, beside others: it is decided after this pass
        if m is None or len(readers[most]) <= len(readers.get(m, ())):
            return noted[task].get(place)
        if self._fresh == version(self._rotations.matrices):
            self._rotations.create(most)
            self._fresh = version(self._rotations.matrices)
            for each in noted:  # inputs of the other size without a gradient, such as those of a gate
                each.clear()
            for (reader, read), size in sizes.items():
                noted[reader][read] = size == most or (False if rep.requires_grad else None)
        elif not self._warned and readers.get(m):
            self._warned = True
            warn_user(
                f"The rotations should have the size that most heads read, got {m} features, as in the head that ran "
                f"first, and {len(readers[most])} heads that read {most} and are not rotated. Pass `rotate` with one "
                "flag per task, False for the heads of another size."
            )
        return noted[task].get(place)

    def _check_dim(self, rep: Tensor, task: int, place: Place, *, alone: bool) -> None:
        """Raise if ``dim`` was not given, and the features of ``rep`` are, or may be, in another dimension."""
        if alone and self._dims.may_be_samples(rep.shape) and not is_transformed():
            raise ValueError(
                "`dim` must be given for a representation of one dimension, got none for shape "
                f"{tuple(rep.shape)}. Pass dim=-1 if these are the features of one sample. If they are samples, (B,), "
                "one number per sample cannot be rotated: pass rotate=False."
            )
        first_layer = self.first_layers.get((task, place[0]))
        if first_layer is not None:
            first_layer.check(rep.shape, self._dims, alone=alone)

    def _was_unrotated(self, task: int, place: Place) -> bool:
        """Whether the head was trained on this input, or on others in the same list, without R_k, which is not I."""
        noted, (part, path) = self.noted[task], place
        beside = siblings(path, [other for number, other in noted if number == part])
        others = [place] if place in noted else [(part, other) for other in beside]
        return bool(others) and not any(noted[other] for other in others) and self._rotations.is_turned(task)

    def as_in_training(self, pairs: Sequence[tuple[Path, Any]], task: int, part: int, *, trains: bool) -> list[Path]:
        """Return the paths of the inputs of a module, replaced by the corresponding ones in training.

        In training mode, inputs with a gradient are not replaced.
        """
        noted = {path: fits for (number, path), fits in self.noted[task].items() if number == part}
        return as_in_training(pairs, noted, self._has_size, trains=trains)

    def note_same(self, place: Place, as_: Place, task: int) -> None:
        """Record that the input at ``place`` corresponds to that at ``as_``."""
        if as_ in self.noted[task]:
            self.noted[task][place] = self.noted[task][as_]
        elif (task, as_) in self._sizes:  # decided after this pass
            self._sizes[task, place] = self._sizes[task, as_]

    def _fits(self, rep: Tensor, *, alone: bool) -> bool | None:
        """Whether ``rep`` has the size of the rotations; None if that is not determined yet. The first z does."""
        if not alone and self._dims.may_be_samples(rep.shape):
            return False
        m, first = self._rotations.size, not any(any(noted.values()) for noted in self.noted)
        if m is None:
            decides = alone or (any(seed is not None for seed in self._rotations.seeds) and rep.ndim > 1)
            return decides or None
        if not self._rotations.covers_all and first and alone and self._dims.size(rep.shape) < m:
            raise ValueError(self._misfit(rep))
        return self._has_size(rep)

    def _has_size(self, rep: Tensor) -> bool:
        """Whether ``rep`` has the size of the rotations."""
        m = self._rotations.size
        return m is not None and self._dims.fit(rep.shape, m, all_of_them=self._rotations.covers_all)

    def propose(self, forks: Iterable[Fork]) -> None:
        """Store the size that most heads read, given ``forks``, in case that no head reads z alone."""
        if self._rotations.size is None and any(self._rotations.rotate):
            readers: dict[int, set[int]] = {}
            together: Counter[int] = Counter()  # the most heads that read one tensor of a size
            for fork in forks:
                if self._dims.exist_in(fork.shape) and not self._dims.may_be_samples(fork.shape):
                    size = self._dims.size(fork.shape)
                    tasks = {task for task in fork.tasks if self._rotations.rotate[task]}
                    readers.setdefault(size, set()).update(tasks)
                    together[size] = max(together[size], len(tasks))
            sizes = [size for size, tasks in readers.items() if tasks]
            self._proposed = max(sizes, key=lambda size: (len(readers[size]), together[size], size), default=None)

    def resize(self, size: int) -> None:
        """Use rotations of ``size``, as other processes do."""
        self._rotations.create(size)
        for (task, place), read in self._sizes.items():
            self.noted[task][place] = read == size

    def decide(self) -> None:
        """Create the proposed rotations. Not in a backward pass, in which checkpointing reruns heads."""
        if self._rotations.size is None and self._proposed is not None:
            self._settle(self._proposed, self._rotations.device)
        if self._fresh is not None and self._rotations.covers_all:
            for (task, place), size in self._sizes.items():  # of heads that ran before the size was determined
                if self.noted[task].get(place) is None:
                    self.noted[task][place] = size == self._rotations.size
        self._fresh = None  # the rotation step has their size from now on

    def keep(self) -> None:
        """Keep random rotations, with which heads were trained in a step with a frozen backbone."""
        if any(seed is not None for seed in self._rotations.seeds):
            self._fresh = None

    def _misfit(self, rep: Tensor) -> str:
        m = self._rotations.size
        rule = f"have {m} features" if self._rotations.covers_all else f"have at least rotation_size={m} features"
        return (
            f"The representation must {rule} along dim={self._dims.dim}, got {self._dims.size(rep.shape)} in shape "
            f"{tuple(rep.shape)}. Either (a) `dim` is the wrong dimension, (b) the input of the head is not "
            "the representation, or (c) its size changes between batches: rotate a dimension of constant size."
        )

    @not_compiled
    def _settle(self, size: int, device: torch.device) -> None:
        """Create the rotations at the first representation; move them with the model."""
        if is_transformed():
            raise RuntimeError(
                "The rotations must exist on the device of the model before it is exported, traced or transformed by "
                "torch.func, got none there. They are created, or moved, when the model runs: run it once before."
            )
        self._follow(device)
        if self._rotations.size is None:
            if size > LARGE:
                warn_user(
                    f"Rotations should be small next to the network, got {size} features: each of "
                    f"{sum(self._rotations.rotate)} rotations has {size} x {size} numbers. Give rotation_size=512 to "
                    "rotate the first ones only, or rotate=False."
                )
            with torch.inference_mode(False):  # a check before training may be the first forward pass
                self._rotations.create(size)
            self._fresh = version(self._rotations.matrices)

    def _rest(self, rep: Tensor) -> None:
        """Create rotations that stay I, so that they can be read, unless they would be large."""
        if rep.device != self._rotations.device:
            self._follow(rep.device)
        unseen = self._rotations.size is None and not is_transformed()
        if unseen and self._dims.exist_in(rep.shape) and self._dims.size(rep.shape) <= LARGE:
            self._settle(self._dims.size(rep.shape), rep.device)

    @not_compiled
    def _follow(self, device: torch.device) -> None:
        """Move the rotations and the stored state to the device of the model."""
        with torch.inference_mode(False):
            self._rotations.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return the known places."""
        return {"noted": [dict(noted) for noted in self.noted], "own": sorted(self.own, key=str)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.noted = [dict(each) for each in state_dict["noted"]]
        self.own = set(state_dict["own"])
