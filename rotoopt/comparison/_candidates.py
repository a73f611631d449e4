"""Candidates: the options that are compared, and descriptions that identify their results in a file."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from rotoopt.weighting import EqualWeighting, GradNorm, RotoGradWeighting, Weighting

Options = Mapping[str, Any]


class _Copies(Mapping[str, Options]):
    """Candidates that are returned as copies: a weighting belongs to one optimizer."""

    def __init__(self, candidates: dict[str, Options]) -> None:
        self._candidates = candidates

    def __getitem__(self, name: str) -> Options:
        return copy.deepcopy(self._candidates[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._candidates)

    def __len__(self) -> int:
        return len(self._candidates)

    def __repr__(self) -> str:
        return repr(self._candidates)


CANDIDATES: Mapping[str, Options] = _Copies(
    {
        "plain sum": {"weighting": EqualWeighting(), "rotate": False},
        "scale only": {"weighting": RotoGradWeighting(), "rotate": False},
        "GradNorm": {"weighting": GradNorm(), "rotate": False},
        "default, rotate=False": {"rotate": False},
        "default": {},
    }
)
"""The default candidates of :func:`compare`: options of :class:`~rotoopt.RotoGradOptimizer`, by name.

``"plain sum"`` trains like ``sum(losses).backward()``, up to the order of additions; ``"scale only"`` gives all task
gradients the same norm in every step. Add your own:
``{**CANDIDATES, "UPGrad": {"weighting": UPGrad(), "rotate": False}}``.
"""


def check_unused(name: str, options: Options) -> None:
    """Raise if the weighting of a candidate already belongs to an optimizer: so would its copies.

    Raises:
        ValueError: If it does.
    """
    weighting = options.get("weighting")
    if isinstance(weighting, Weighting) and weighting._bound:
        raise ValueError(
            f"`candidates[{name!r}]` must have a weighting of its own, got a {type(weighting).__name__} that an "
            f"optimizer uses. Make a new {type(weighting).__name__}; every run gets a copy of it."
        )


def describe(value: Any) -> str:
    """Describe an option with everything in it: the same text in every process, another one if a part changes.

    A function is described by its name alone.

    Example:
        >>> describe({"weighting": EqualWeighting(), "rotate": False})
        "{'rotate': False, 'weighting': EqualWeighting()}"
        >>> describe(GradNorm(alpha=0.5)) == describe(GradNorm(alpha=1.0))
        False
    """
    return _describe(value, ())


def _describe(value: Any, inside: tuple[int, ...]) -> str:
    if id(value) in inside:
        return "..."
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{key!r}: {_describe(each, inside)}" for key, each in value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_describe(each, inside) for each in value) + "]"
    if isinstance(value, Tensor):
        return f"tensor({value.tolist()})"
    if isinstance(value, functools.partial):
        return f"partial({_describe([value.func, value.args, value.keywords], inside)})"
    if hasattr(value, "__qualname__"):  # functions and classes
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dict__"):
        parts = (f"{name}={_describe(each, inside)}" for name, each in sorted(vars(value).items()))
        return f"{type(value).__qualname__}({', '.join(parts)})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
