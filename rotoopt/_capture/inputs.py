"""Inputs of a head: the tensors among them, however deep in lists, tuples and dicts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rotoopt._capture.places import Z
from rotoopt._torch.private import keystr, tree_flatten_with_path, tree_unflatten

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def is_floating(leaf: object) -> bool:
    """Whether ``leaf`` is a floating-point tensor."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def paths_and_leaves(inputs: Inputs) -> tuple[list[tuple[str, Any]], Any]:
    """Return everything among ``inputs`` with its path, and their structure. An only floating-point tensor is z."""
    pairs, structure = tree_flatten_with_path(inputs)
    alone = sum([is_floating(leaf) for _, leaf in pairs]) == 1
    return [(Z if alone and is_floating(leaf) else keystr(path), leaf) for path, leaf in pairs], structure


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
    if not isinstance(given, (list, tuple)):  # torch.compile before 2.9 knows no `A | B`
        return again, again is given
    parts = [_with_containers_of(*pair) for pair in zip(given, again, strict=True)]
    if all([same for _, same in parts]):  # noqa: C419
        return given, True
    entries = [part for part, _ in parts]
    if isinstance(given, list):
        again[:] = entries
        return again, False
    return (type(again)(*entries) if hasattr(again, "_fields") else tuple(entries)), False
