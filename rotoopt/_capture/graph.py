"""Autograd graphs: what a loss was computed from, in front of its rotation and behind it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from rotoopt._capture.fork import Fork

Node = Any  # torch.autograd.graph.Node, whose attributes depend on the operation


def reached(roots: Iterable[Node | None], *, stop_at_rotations: bool = False) -> set[Node]:
    """Return the nodes of a graph from ``roots`` back to the leaves, or back to the rotations and these included."""
    found: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if not (stop_at_rotations and is_rotation(node)):
            stack.extend(_inputs(node))
    return found


def in_heads(loss: Tensor) -> set[Node]:
    """Return the nodes between ``loss`` and the rotations: those of its head, and of whatever goes around it."""
    return {node for node in reached([loss.grad_fn], stop_at_rotations=True) if not is_rotation(node)}


def behind_rotations(loss: Tensor) -> set[Node]:
    """Return the nodes of the backbone: those that ``loss`` reaches through rotations."""
    nearest = filter(is_rotation, reached([loss.grad_fn], stop_at_rotations=True))
    return reached(parent for node in nearest for parent in _inputs(node))


def is_rotation(node: Node) -> bool:
    """Whether ``node`` is a rotation in front of a head; it has the attributes ``task`` and ``fork`` then."""
    return isinstance(getattr(node, "fork", None), Fork)


def is_leaf(node: Node) -> bool:
    """Whether ``node`` stands for a parameter, or another leaf that requires grad."""
    return hasattr(node, "variable")


def leaves(nodes: Iterable[Node]) -> list[Tensor]:
    """Return the parameters among ``nodes``."""
    return [node.variable for node in nodes if is_leaf(node)]


def _inputs(node: Node) -> list[Node | None]:
    return [parent for parent, _ in node.next_functions]
