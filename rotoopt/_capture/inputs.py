"""Inputs of a head: the tensors among them, however deep in lists, tuples and dicts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rotoopt._capture.paths import Arguments, Path
from rotoopt._torch.private import tree_flatten_with_path, tree_unflatten

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def is_floating(leaf: object) -> bool:
    """Whether ``leaf`` is a floating-point tensor."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def paths_and_leaves(inputs: Inputs, arguments: Arguments) -> tuple[list[tuple[Path, Any]], Any]:
    """Return everything among ``inputs`` with its path, and their structure."""
    pairs, structure = tree_flatten_with_path(inputs)
    return [(_path(keys, arguments), leaf) for keys, leaf in pairs], structure


def _path(keys: Any, arguments: Arguments) -> Path:
    by_position = keys[0].idx == 0
    first = arguments.by_position(keys[1].idx) if by_position else arguments.by_keyword(keys[1].key)
    return (*first, *[_entry(key) for key in keys[2:]])


def _entry(key: Any) -> str | int:
    if hasattr(key, "idx"):
        return int(key.idx)
    return str(key.key) if hasattr(key, "key") else str(key.name)


def rebuilt(inputs: Inputs, leaves: list[Any], structure: Any) -> Inputs:
    """Return ``inputs`` with other leaves; a container in which nothing changes is the same: a head may write to it."""
    again: Inputs = _with_containers_of(inputs, tree_unflatten(leaves, structure))[0]
    return again


def _with_containers_of(given: Any, again: Any) -> tuple[Any, bool]:
    """Return ``again`` with those containers of ``given`` in which nothing changed, and whether that is all of it."""
    # Whether something changed is handed up, and lists are made of it: torch.compile compares no tuples by identity,
    # and traces no generators.
    if isinstance(given, dict):
        items = {key: _with_containers_of(given[key], again[key]) for key in given}
        if all([same for _, same in items.values()]):  # noqa: C419
            return given, True
        again.update({key: item for key, (item, _) in items.items()})
        return again, False
    if not isinstance(given, list | tuple):
        return again, again is given
    parts = [_with_containers_of(*pair) for pair in zip(given, again, strict=True)]
    if all([same for _, same in parts]):  # noqa: C419
        return given, True
    entries = [part for part, _ in parts]
    if isinstance(given, list):
        again[:] = entries
        return again, False
    return (type(again)(*entries) if hasattr(again, "_fields") else tuple(entries)), False
