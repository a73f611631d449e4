"""Paths: names of the tensors among the inputs of a head, and how those in evaluation correspond to training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# The number of an argument as a word, then positions in lists and tuples as numbers, and keys of dicts as words.
Path = tuple[str | int, ...]
Z: Path = ("0",)  # z in head(z)


@dataclass(frozen=True)
class Arguments:
    """Names of the arguments of a module, so that ``head(z, mask)`` and ``head(mask=mask, z=z)`` are equivalent.

    Attributes:
        names: Named arguments, in order.
        num_positional: How many of these can be given by position.
        hands_on: Whether it takes ``*args`` and ``**kwargs``, which are arguments of another module.
    """

    names: tuple[str, ...] = ()
    num_positional: int = 0
    hands_on: bool = True

    @classmethod
    def of(cls, module: nn.Module) -> Arguments:
        """Return the arguments of ``module.forward``."""
        try:
            parameters = inspect.signature(module.forward).parameters.values()
        except (TypeError, ValueError):  # compiled code has no signature
            return cls()
        kinds = {each.kind for each in parameters}
        positional = [each.name for each in parameters if each.kind <= each.POSITIONAL_OR_KEYWORD]
        return cls(
            (*positional, *[each.name for each in parameters if each.kind is each.KEYWORD_ONLY]),
            len(positional),
            {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds,
        )

    @property  # not cached: torch.compile would compile the head again after the first call
    def first(self) -> Path:
        """The path of the first argument by position."""
        return self.by_position(0)

    def by_position(self, index: int) -> Path:
        """Return the path of the argument at ``index``; entries of ``*args`` are treated like those of a list."""
        return (str(index),) if self.hands_on or index < self.num_positional else ("*", index)

    def by_keyword(self, key: str) -> Path:
        """Return the path of the argument ``key``; entries of ``**kwargs`` are treated like those of a dict."""
        if key in self.names:
            return (str(self.names.index(key)),)
        return (key,) if self.hands_on else ("**", key)


def as_in_training(
    pairs: Sequence[tuple[Path, Any]],
    noted: Mapping[Path, bool | None],
    fits: Callable[[Tensor], bool],
    *,
    trains: bool = False,
) -> list[Path]:
    """Return the paths of inputs, with those that did not exist in training replaced by corresponding ones.

    For example if a list is longer, a dict has another key, a mask is added, or z is given by keyword.

    Args:
        pairs: All inputs with their paths.
        noted: The paths in training, and whether the input there is rotated; None if it had no gradient.
        fits: Whether a tensor has the size of the rotations.
        trains: Whether the head is in training mode; inputs with a gradient are then not replaced.
    """
    found = [
        _of_training(path, leaf, noted, fits) if _is_floating(leaf) and not (trains and leaf.requires_grad) else path
        for path, leaf in pairs
    ]
    rotated = [path for path, rotates in noted.items() if rotates]
    if trains or not rotated or any(path in noted for path in found):
        return found
    fitting = [i for i, (_, leaf) in enumerate(pairs) if _is_floating(leaf) and fits(leaf)]
    if not fitting:
        return found
    if len(fitting) > 1 or len(rotated) > 1:
        raise ValueError(
            "The inputs of a head in evaluation must correspond to those in training, got tensors in other arguments, "
            "or more of them. It is ambiguous which is rotated."
        )
    return [rotated[0] if i == fitting[0] else path for i, path in enumerate(found)]


def _of_training(path: Path, leaf: Tensor, noted: Mapping[Path, bool | None], fits: Callable[[Tensor], bool]) -> Path:
    kin = [] if path in noted else siblings(path, noted)
    if not kin:
        return path
    rotated = [other for other in kin if noted[other]]
    others = [other for other in kin if not noted[other]]
    if not fits(leaf):
        return others[0] if others else path
    if rotated and any(noted[other] is None for other in others):
        raise ValueError(
            "A list or dict of inputs must have the same entries as in training, if only some of them had a gradient, "
            f"got {described(path)}, which was not in it. Pass inputs without gradient as separate arguments."
        )
    return rotated[0] if rotated else others[0]


def siblings(path: Path, paths: Iterable[Path]) -> list[Path]:
    """Return those of ``paths`` that differ from ``path`` only in list positions; if there are none, also in keys."""
    alike = [other for other in paths if len(other) == len(path) > 1 and other[0] == path[0] and other != path]
    pattern = _without_positions(path)
    return [other for other in alike if _without_positions(other) == pattern] or alike


def described(path: Path) -> str:
    """Describe ``path`` for an error."""
    return f"argument {path[0]}" + "".join([f"[{entry!r}]" for entry in path[1:]])


def _without_positions(path: Path) -> list[str | None]:
    return [None if isinstance(entry, int) else entry for entry in path]


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
