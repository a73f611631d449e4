"""Whereabouts: whether a rotation is still the one that the weights behind it were trained with."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt._capture.places import Places
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.private import version

ENTRY = "rotoopt"  # in the metadata of a module in a state dict
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHUNK = 1 << 24  # entries that are cast at a time, to save memory for large heads

LOST = (
    "Weights of a head should be loaded with the rotation that they were trained with, got a state dict without it, "
    "after updates of the rotations. Predictions differ from those of the model that was saved. Either (a) only its "
    "items were kept, or changed: copy.deepcopy(model.state_dict()) has the rotations, (b) the state of the "
    "optimizer was not loaded: optimizer.load_state_dict(...), or (c) the model that was saved had no rotations, as "
    "the initial weights for every fold of a cross-validation: call optimizer.remove(), load them, and build "
    "a new optimizer."
)
UNKNOWN = (
    "Weights of a head should be loaded with the rotation that they were trained with, got a dict without the metadata "
    "of model.state_dict(), as from a safetensors file, or sharded weights, which are saved without it. If the model "
    "that was saved had rotations, predictions differ: load the state of the optimizer as well, "
    "optimizer.load_state_dict(...). If it had none, load its weights before the optimizer is built."
)
NOT_CREATED = -1
STALE = (
    "A copy of the model should have the rotations that its weights were trained with, got one whose weights were "
    "updated, but not its rotations, while those of the model were. Its predictions are wrong. Call "
    "optimizer.refresh(model_copy) after updating its weights, or "
    "model_copy.load_state_dict(model.state_dict())."
)


class Whereabouts:
    """Stores the rotations with the weights of their heads, and checks that they were loaded together.

    Args:
        rotations: The K rotations.
        places: Where they are applied.

    Attributes:
        heads: The modules that they are applied in front of, by ``(task, part)``.
    """

    def __init__(self, rotations: Rotations, places: Places) -> None:
        self.heads: dict[tuple[int, int], nn.Module] = {}
        self._rotations = rotations
        self._places = places
        self._loaded: int | None = None

    def weights(self, task: int, part: int) -> Sequence[Tensor]:
        """Return the weights that a rotation belongs to: those of its head, or of all heads if that one has none."""
        own = list(self.heads[task, part].parameters())
        return own or [weight for head in self.heads.values() for weight in head.parameters()]

    def saved(self, task: int, part: int) -> dict[str, Any]:
        """Return the state for the weights of a module of a head: its rotation, None for I, and where it rotates.

        If the rotation does not exist yet, the seed that it will be drawn from.
        """
        rotations, noted = self._rotations, self._places.noted[task].items()
        return {
            "rotation": rotations[task].clone() if rotations.is_turned(task) else None,
            "seed": rotations.seeds[task] if rotations.size is None else None,
            "places": {path: fits for (number, path), fits in noted if number == part},
        }

    def load(self, task: int, part: int, saved: dict[str, Any]) -> str | None:
        """Load what :meth:`saved` returned; return the reason if it does not match."""
        matrix, seed, rotations = saved["rotation"], saved["seed"], self._rotations
        if not (matrix is None and seed is None) and not rotations.rotate[task]:
            return "the weights need a rotation, and the task has rotate=False."
        if matrix is not None and rotations.size not in (None, len(matrix)):
            return f"the weights need a rotation of {len(matrix)} features, and the current ones have {rotations.size}."
        if matrix is not None:
            rotations.load_matrix(task, matrix)
        else:
            rotations.start(task, seed)
        self._places.noted[task].update({(part, path): fits for path, fits in saved["places"].items()})
        return None

    def mark_as_loaded(self) -> None:
        """Record that the rotations belong to weights that were, or will be, loaded with them."""
        self._loaded = changes_of(self._rotations)

    def are_loaded(self) -> bool:
        """Whether the rotations are those that were loaded with the weights, or were created as I since."""
        rotations = self._rotations
        if self._loaded == NOT_CREATED:
            return not any(map(rotations.is_turned, range(rotations.num_tasks)))
        return self._loaded == changes_of(rotations)

    def what_is_lost(self, task: int, saved: dict[str, Any] | None, *, would_know: bool) -> str | None:
        """Return the warning about weights of ``task`` that were loaded without their rotation; None if it is theirs.

        Args:
            task: k.
            saved: What :meth:`saved` returned for weights other than those loaded, if known.
            would_know: Whether the state dict would have had the rotation, if there was one.
        """
        rotations = self._rotations
        needs_one = saved is not None and not (saved["rotation"] is None and saved["seed"] is None)
        if self.are_loaded():
            return None
        if needs_one or rotations.is_turned(task):
            return LOST
        is_new = not self._places.noted[task]  # otherwise the weights come from this process, most likely
        return UNKNOWN if rotations.rotate[task] and is_new and not would_know else None


def checksums(state_dict: Mapping[str, Any], prefix: str) -> Tensor | None:
    """Return checksums of the weights below ``prefix``: as they are, and cast to every dtype. Shape ``(5,)``, int64.

    The metadata of a state dict remains if its weights are overwritten, as averaging and
    torch.distributed.checkpoint do, or cast, in which case they still belong to their rotation.

    Returns:
        None if the weights are not on this process.
    """
    tensors = [each for key, each in state_dict.items() if key.startswith(prefix) and isinstance(each, Tensor)]
    if any(hasattr(each, "to_local") or each.is_meta for each in tensors):
        return None
    weights = [each for each in tensors if each.layout == torch.strided and (each.ndim or each.is_floating_point())]
    total = torch.zeros(1 + len(DTYPES), dtype=torch.int64, device="cpu")
    for weight in weights:
        for part in torch.split(weight.detach().reshape(-1), CHUNK):
            here = part.cpu() if part.device.type == "mps" else part  # it has no float64
            casts = [here.to(dtype) for dtype in DTYPES] if here.is_floating_point() else [here] * len(DTYPES)
            total += torch.stack([sum_of_bits(each) for each in (here, *casts)]).cpu()
    return total


def is_here(tensor: Tensor) -> bool:
    """Whether all values of ``tensor`` are on this process."""
    return not hasattr(tensor, "to_local") and not tensor.is_meta and tensor.layout == torch.strided


def sum_of_bits(tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` as integers, which is exact on all devices, in any order. Shape ``()``, int64."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.is_floating_point() and tensor.itemsize in kinds:
        tensor = tensor.contiguous().view(kinds[tensor.itemsize])
    return tensor.sum(dtype=torch.int64)


class Origin:
    """The original of a copied head, and the state in which their rotations were equal.

    Args:
        rotations: The rotations of the original.
        weights: The weights of the original, and of its copy.
    """

    def __init__(self, rotations: Rotations, weights: Sequence[Tensor]) -> None:
        self._rotations = weakref.ref(rotations)  # if they still exist
        self._turned = self._looked = changes_of(rotations)
        self._sums: list[tuple[torch.dtype, Tensor] | None] | None
        self._note(weights)
        self._versions = 0  # version counters of the copy

    def renew(self, weights: Sequence[Tensor] | None) -> None:
        """Treat the rotations of the copy as those of ``weights``; None: of those that it runs with next."""
        rotations = self._rotations()
        self._turned = self._turned if rotations is None else changes_of(rotations)
        self._sums = None
        if weights is not None:
            self._note(weights)

    def _note(self, weights: Sequence[Tensor]) -> None:
        """Record the present ``weights``, without synchronization."""
        self._versions = _versions_of(weights)
        self._sums = [(each.dtype, sum_of_bits(each)) if is_here(each) else None for each in weights]

    def has_moved_on(self, weights: Sequence[Tensor], *, waits: bool) -> bool:
        """Whether the weights of the copy have changed, and the rotations of the model as well.

        Args:
            weights: The weights of the copy.
            waits: Whether to synchronize every time. Otherwise once after every update of the rotations: writing to
                ``param.data`` does not change the version counter.
        """
        if self._sums is None:
            self._note(weights)
        assert self._sums is not None
        rotations = self._rotations()
        turned = self._turned if rotations is None else changes_of(rotations)
        versions = _versions_of(weights)
        if turned == self._turned or not (waits or versions != self._versions or turned != self._looked):
            return False
        self._looked, self._versions = turned, versions
        return len(weights) != len(self._sums) or any(map(_differs, weights, self._sums))


def changes_of(rotations: Rotations) -> int:
    """Return the version counter of ``rotations``."""
    return NOT_CREATED if rotations.size is None else version(rotations.matrices)


def _versions_of(weights: Sequence[Tensor]) -> int:
    return sum(version(weight) for weight in weights if not weight.is_inference())


def _differs(weight: Tensor, noted: tuple[torch.dtype, Tensor] | None) -> bool:
    """Whether ``weight`` has changed since; a cast does not count."""
    if noted is None or not is_here(weight) or weight.dtype != noted[0]:
        return False
    return not torch.equal(sum_of_bits(weight).to(noted[1].device), noted[1])
