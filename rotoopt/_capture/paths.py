"""Paths: what a tensor among the inputs of a head is called, and which one of training it stands for in evaluation."""

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
    """What a module calls its arguments, so that ``head(z, mask)`` and ``head(mask=mask, z=z)`` are the same.

    Attributes:
        names: Those that have names, in order.
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
        except (TypeError, ValueError):  # it is compiled code
            return cls()
        kinds = {each.kind for each in parameters}
        positional = [each.name for each in parameters if each.kind <= each.POSITIONAL_OR_KEYWORD]
        return cls(
            (*positional, *[each.name for each in parameters if each.kind is each.KEYWORD_ONLY]),
            len(positional),
            {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds,
        )

    def by_position(self, index: int) -> Path:
        """Return the path of the argument at ``index``; entries of ``*args`` are those of a list."""
        return (str(index),) if self.hands_on or index < self.num_positional else ("*", index)

    def by_keyword(self, key: str) -> Path:
        """Return the path of the argument ``key``; entries of ``**kwargs`` are those of a dict."""
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
    """Return the paths of inputs, each replaced by one of training that it stands for where training had not this one.

    So it is where a list is longer, a dict has another key, a mask is given that was not, or z comes by keyword.

    Args:
        pairs: Everything among the inputs, with its path.
        noted: The paths of training, and whether what comes there is rotated; None where it had no gradient.
        fits: Whether a tensor has the size of the rotations.
        trains: Whether the head trains: what has a gradient stands for itself then.
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
            "A head must get its inputs in evaluation as in training, got tensors in other arguments, or more of them. "
            "It cannot be told which is rotated."
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
            "A list or dict that a head gets must have the entries of training, if only some had a gradient there, got "
            f"{described(path)}, which was not in it. Give the head what has no gradient as an argument of its own."
        )
    return rotated[0] if rotated else others[0]


def siblings(path: Path, paths: Iterable[Path]) -> list[Path]:
    """Return those of ``paths`` that differ from ``path`` in positions in lists; failing these, in keys, too."""
    alike = [other for other in paths if len(other) == len(path) > 1 and other[0] == path[0] and other != path]
    pattern = _without_positions(path)
    return [other for other in alike if _without_positions(other) == pattern] or alike


def described(path: Path) -> str:
    """Return ``path`` in words."""
    return f"argument {path[0]}" + "".join([f"[{entry!r}]" for entry in path[1:]])


def _without_positions(path: Path) -> list[str | None]:
    return [None if isinstance(entry, int) else entry for entry in path]


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
