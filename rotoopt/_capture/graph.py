"""Autograd graphs: what a loss was computed from, in front of the taps and behind them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from rotoopt._capture.fork import Fork
from rotoopt._torch.private import num_outputs, output_numel, selected_index

Node = Any  # torch.autograd.graph.Node, whose attributes depend on the operation

# What adds losses up, or multiplies them: behind these, a sum of losses is still a sum of losses.
SUMS = {"Add", "Sub", "Rsub", "Neg", "Mul", "Div", "Sum", "Mean", "Stack", "Cat", "Unbind", "Select"}
SUMS |= {"View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Clone", "ToCopy", "Expand"}
# What DistributedDataParallel lets all outputs pass, and FSDP all inputs, each by itself.
HANDED_ON = {"_DDPSink", "RegisterPostBackwardFunction"}
BUNDLES = {"Unbind", "Split", "SplitWithSizes"}


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


def is_bundle(node: Node) -> bool:
    """Whether ``node`` has several outputs that may have nothing to do with each other.

    Such are a graph that was compiled, and ``torch.unbind``.
    """
    return num_outputs(node) > 1 and (isinstance(node, BackwardCFunction) or operation(node) in BUNDLES)


def operation(node: Node) -> str:
    """Return the name of the operation, as ``"Addmm"``."""
    name: str = node.name()
    return name.partition("Backward")[0]


def leaves(nodes: Iterable[Node]) -> list[Tensor]:
    """Return the parameters among ``nodes``."""
    return [node.variable for node in nodes if is_leaf(node)]


def inputs(node: Node) -> list[Node | None]:
    """Return the nodes that made the inputs of ``node``."""
    return [source(*edge)[0] for edge in node.next_functions]


def source(node: Node | None, output: int) -> tuple[Node | None, int]:
    """Return ``node`` and ``output``, the number of its output; what it got there if it only hands tensors on."""
    while node is not None and operation(node) in HANDED_ON:
        node, output = node.next_functions[output]
    return node, output


def is_handed_on(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a copy that only hands on what another one is, as an output of DistributedDataParallel."""
    return tensor.grad_fn is not None and operation(tensor.grad_fn) in HANDED_ON


def terms(root: Node | None, num_tasks: int) -> set[Node]:
    """Return the losses that ``root`` was computed from, as nodes.

    So of ``sum(losses)``, or of ``(w * torch.stack(losses)).sum()``. A loss is a number that was made of more than
    ``num_tasks`` numbers.
    """
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parts = [part for part in inputs(node) if part is not None]
        if parts and not is_tap(node) and all((output_numel(part) or num_tasks + 1) <= num_tasks for part in parts):
            stack.extend(part for part in parts if not is_leaf(part))
        else:
            found.add(node)
    return found


def made_by(loss: Tensor) -> Node:
    """Return what made ``loss``; where that is an entry of a stack, ``torch.stack(losses)[k]``, what made the entry."""
    return _entry(*source(loss.grad_fn, loss.output_nr))


def _entry(node: Node, output: int) -> Node:
    """Return what made the number that is output ``output`` of ``node``."""
    parts = [source(*edge) for edge in node.next_functions if edge[0] is not None]
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
    if operation(node) == "Stack":
        return inputs(node)[index]
    if operation(node) not in {"Mul", "Div", "Add", "Sub", "Neg"}:
        return None
    found = (_stacked(part, index) for part in inputs(node) if part is not None)
    return next((entry for entry in found if entry is not None), None)


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
