"""Autograd graphs: what a loss was computed from, in front of the taps and behind them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from rotoopt._capture.fork import Fork
from rotoopt._torch.private import output_numel, selected_index

Node = Any  # torch.autograd.graph.Node, whose attributes depend on the operation

# What adds losses up, or multiplies them: behind these, a sum of losses is still a sum of losses.
SUMS = {"Add", "Sub", "Rsub", "Neg", "Mul", "Div", "Sum", "Mean", "Stack", "Cat", "Unbind", "Select"}
SUMS |= {"View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Clone", "ToCopy", "Expand"}


def reached(roots: Iterable[Node | None], *, stop_at_taps: bool = False) -> set[Node]:
    """Return the nodes of a graph from ``roots`` back to the leaves, or back to the taps and these included."""
    found: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if not (stop_at_taps and is_tap(node)):
            stack.extend(inputs(node))
    return found


def taps_of(roots: Iterable[Node | None]) -> set[Node]:
    """Return the nearest taps: those that are reached from ``roots`` without passing another one."""
    return set(filter(is_tap, reached(roots, stop_at_taps=True)))


def in_heads(loss: Tensor) -> set[Node]:
    """Return the nodes between ``loss`` and the taps: those of its head, and of whatever goes around it."""
    return {node for node in reached([loss.grad_fn], stop_at_taps=True) if not is_tap(node)}


def behind(taps: Iterable[Node]) -> set[Node]:
    """Return the nodes behind ``taps``: those of the backbone."""
    return reached(parent for tap in taps for parent in inputs(tap))


def behind_taps(loss: Tensor) -> set[Node]:
    """Return the nodes that ``loss`` reaches through taps."""
    return behind(taps_of([loss.grad_fn]))


def is_tap(node: Node) -> bool:
    """Whether ``node`` is where a tensor enters a head; it has the attributes ``task`` and ``fork`` then."""
    return isinstance(getattr(node, "fork", None), Fork)


def is_leaf(node: Node) -> bool:
    """Whether ``node`` stands for a parameter, or another leaf that requires grad."""
    return hasattr(node, "variable")


def is_sum(node: Node) -> bool:
    """Whether ``node`` adds numbers up, multiplies them, or puts them together."""
    return operation(node) in SUMS


def operation(node: Node) -> str:
    """Return the name of the operation, as ``"Addmm"``."""
    name: str = node.name()
    return name.partition("Backward")[0]


def leaves(nodes: Iterable[Node]) -> list[Tensor]:
    """Return the parameters among ``nodes``."""
    return [node.variable for node in nodes if is_leaf(node)]


def inputs(node: Node) -> list[Node | None]:
    """Return the nodes that made the inputs of ``node``."""
    return [parent for parent, _ in node.next_functions]


def terms(root: Node | None) -> set[Node]:
    """Return the losses that ``root`` is a sum of, as nodes: of ``sum(losses)``, of ``(w * torch.stack(losses)).mean()``.

    What a loss itself is a sum of is not taken apart: only what is one number is, or a few that were put together.
    """
    found: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node is None or node in found:
            continue
        parts = [part for part in inputs(node) if part is not None]
        if is_sum(node) and parts and all(map(_is_of_numbers, parts)):
            stack.extend(parts)
        else:
            found.add(node)
    return found


def _is_of_numbers(node: Node) -> bool:
    """Whether ``node`` makes one number, or puts some together."""
    if output_numel(node) == 1:
        return True
    parts = [part for part in inputs(node) if part is not None]
    return is_sum(node) and bool(parts) and all(map(_is_of_numbers, parts))


def made_by(loss: Tensor) -> Node:
    """Return what made ``loss``; where that is an entry of a stack, ``torch.stack(losses)[k]``, what made the entry."""
    return _entry(loss.grad_fn, loss.output_nr)


def _entry(node: Node, output: int) -> Node:
    """Return what made the number that is output ``output`` of ``node``."""
    parts = [(part, number) for part, number in node.next_functions if part is not None]
    found = None
    if operation(node) == "Unbind":
        found = _stacked(parts[0][0], output)
    elif operation(node) == "Select":
        found = _stacked(parts[0][0], selected_index(node))
    elif is_sum(node) and len(parts) == 1 and output_numel(parts[0][0]) == 1:
        found = _entry(*parts[0])
    return node if found is None else found


def _stacked(node: Node, index: int) -> Node | None:
    """Return what made entry ``index`` of a vector, if it was stacked."""
    parts = [part for part in inputs(node) if part is not None]
    if operation(node) == "Stack":
        return inputs(node)[index]
    if operation(node) in {"Mul", "Div", "Add", "Neg"} and len(parts) == 1:
        return _stacked(parts[0], index)
    return None


def without_taps(loss: Node) -> set[Node]:
    """Return the nodes in front of the taps that no tap is behind: what goes around the heads."""
    near = reached([loss], stop_at_taps=True)
    return near - reaching(near, filter(is_tap, near))


def reaching(nodes: Iterable[Node], targets: Iterable[Node]) -> set[Node]:
    """Return those of ``nodes`` that ``targets`` are reached from, and these."""
    users: dict[Node, list[Node]] = {}
    for node in nodes:
        for part in filter(None, inputs(node)):
            users.setdefault(part, []).append(node)
    found, stack = set(), list(targets)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(users.get(node, ()))
    return found
