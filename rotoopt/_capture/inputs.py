"""Inputs of a head: the tensors in nested lists, tuples, dicts and dataclasses."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from rotoopt._capture.paths import Arguments, Path
from rotoopt._torch.private import tree_flatten_with_path, tree_unflatten

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
DICTS = dict, UserDict


def is_floating(leaf: object) -> bool:
    """Whether ``leaf`` is a floating-point tensor."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def paths_and_leaves(inputs: Inputs, arguments: Arguments) -> list[tuple[Path, Any]]:
    """Return everything among ``inputs`` with its path."""
    found: list[tuple[Path, Any]] = []
    for index, value in enumerate(inputs[0]):
        _collect(value, arguments.by_position(index), found)
    for key, value in inputs[1].items():
        _collect(value, arguments.by_keyword(key), found)
    return found


def leaves_of(value: Any) -> list[Any]:
    """Return everything in nested containers."""
    found: list[tuple[Path, Any]] = []
    _collect(value, (), found)
    return [leaf for _, leaf in found]


def _collect(value: Any, path: Path, found: list[tuple[Path, Any]]) -> None:
    if value is None or isinstance(value, Tensor | int | float | str):
        found.append((path, value))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            _collect(each, (*path, index), found)
    elif has_items(value):
        for key, item in items_of(value).items():
            _collect(item, (*path, str(key)), found)
    else:  # a class that is registered with torch's pytree
        for keys, leaf in tree_flatten_with_path(value)[0]:
            found.append(((*path, *[_entry(key) for key in keys]), leaf))


def has_items(value: object) -> bool:
    """Whether ``value`` is a dict, or of a dataclass."""
    return isinstance(value, DICTS) or (is_dataclass(value) and not isinstance(value, type))


def items_of(value: Any) -> dict[Any, Any]:
    """Return the items of a dict, or the attributes of a dataclass by name."""
    if isinstance(value, DICTS):
        return {key: value[key] for key in value}
    if hasattr(value, "__dict__"):
        return dict(vars(value))
    return {each.name: getattr(value, each.name) for each in fields(value)}  # it has slots


def set_item(value: Any, key: Any, item: Any) -> None:
    """Set what :func:`items_of` returns."""
    if isinstance(value, DICTS):
        value[key] = item
    else:
        object.__setattr__(value, key, item)  # also of a frozen dataclass


def remove_item(value: Any, key: Any) -> None:
    """Remove what :func:`items_of` returns."""
    if isinstance(value, DICTS):
        del value[key]
    else:
        object.__delattr__(value, key)


def _entry(key: Any) -> str | int:
    if hasattr(key, "idx"):
        return int(key.idx)
    return str(key.key) if hasattr(key, "key") else str(key.name)


def rebuilt(inputs: Inputs, leaves: list[Any]) -> Inputs:
    """Return ``inputs`` with other leaves, in containers of the same types.

    A container without changes is returned itself: a head may write to it.
    """
    rest = iter(leaves)
    args = [_rebuilt(value, rest)[0] for value in inputs[0]]
    return tuple(args), {key: _rebuilt(value, rest)[0] for key, value in inputs[1].items()}


def _rebuilt(given: Any, rest: Iterator[Any]) -> tuple[Any, bool]:
    """Return ``given`` with its leaves replaced by the next ones of ``rest``, and whether nothing changed."""
    # Flags are returned, and lists are built from them, because torch.compile can neither compare tuples by identity
    # nor trace generators.
    if given is None or isinstance(given, (Tensor, int, float, str)):
        leaf = next(rest)
        return leaf, leaf is given
    if isinstance(given, (list, tuple)):  # torch.compile before 2.9 cannot trace `A | B`
        parts = [_rebuilt(each, rest) for each in given]
        if all([same for _, same in parts]):  # noqa: C419
            return given, True
        return _list_like(given, [part for part, _ in parts]), False
    if has_items(given):
        items = {key: _rebuilt(item, rest) for key, item in items_of(given).items()}
        if all([same for _, same in items.values()]):  # noqa: C419
            return given, True
        return _with_items(given, {key: item for key, (item, _) in items.items()}), False
    before, structure = tree_flatten_with_path(given)
    after = [next(rest) for _ in before]
    if all([new is old for new, (_, old) in zip(after, before, strict=True)]):  # noqa: C419
        return given, True
    return (after[0] if not before[0][0] else tree_unflatten(after, structure)), False


def _with_items(given: Any, items: dict[Any, Any]) -> Any:
    """Return a copy of ``given`` with other items."""
    if type(given) is dict:
        return items
    try:
        again = _copied(given)
        for key in items:
            set_item(again, key, items[key])
    except Exception as error:
        raise TypeError(
            "A dict or dataclass with inputs of a head must support copy.copy() and setting items, got a "
            f"{type(given).__name__} ({error}). Pass a dict of its items to the head."
        ) from error
    return again


def _copied(given: Any) -> Any:
    try:
        return copy.copy(given)
    except KeyError:  # before Python 3.11, of an attribute that is looked up as an item
        return type(given)(given)


def _list_like(given: list[Any] | tuple[Any, ...], entries: list[Any]) -> Any:
    """Return a list or tuple of the type of ``given`` with other entries."""
    kind: Any = type(given)
    if kind is list:
        return entries
    if isinstance(given, list):
        again = copy.copy(given)
        again[:] = entries
        return again
    if kind is tuple:
        return tuple(entries)
    if hasattr(kind, "n_sequence_fields"):  # of torch, such as torch.return_types.max
        return kind(entries)
    again = tuple.__new__(kind, entries)  # a class may have another __new__
    if getattr(given, "__dict__", None):
        vars(again).update(vars(given))
    return again
