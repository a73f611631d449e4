"""Autograd graphs: what a loss was computed from, before and after the taps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from rotoopt._capture.fork import Fork
from rotoopt._capture.representation import RotatedDims
from rotoopt._torch.private import num_outputs

Node = Any  # torch.autograd.graph.Node, whose attributes depend on the operation
AreOwn = Callable[[Iterable[Tensor], int], bool]  # whether parameters belong to a task alone
Edge = tuple[Node, int]  # the operation that computed a tensor, and the index of that output

# Operations that add, multiply or concatenate, as in a penalty on all parameters.
SUMS = {"Add", "Sub", "Rsub", "Neg", "Mul", "Div", "Sum", "Mean", "Stack", "Cat", "Unbind", "Select"}
SUMS |= {"View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Clone", "ToCopy", "Expand"}
# DistributedDataParallel passes all outputs through this, and FSDP all inputs, each one unchanged.
HANDED_ON = {"_DDPSink", "RegisterPostBackwardFunction"}


def reached(roots: Iterable[Node | None], *, stop_at: Callable[[Node], bool] | None = None) -> set[Node]:
    """Return the nodes of a graph from ``roots`` back to the leaves, or back to nodes to ``stop_at`` (included)."""
    found: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if stop_at is None or not stop_at(node):
            stack.extend(inputs(node))
    return found


def taps_of(roots: Iterable[Node | None]) -> set[Node]:
    """Return the nearest taps: those that are reached from ``roots`` without passing another one."""
    return set(filter(is_tap, reached(roots, stop_at=is_tap)))


def in_heads(loss: Tensor) -> set[Node]:
    """Return the nodes between ``loss`` and the taps: those of its head, and of any bypass."""
    return {node for node in reached([loss.grad_fn], stop_at=is_tap) if not is_tap(node)}


def behind(taps: Iterable[Node]) -> set[Node]:
    """Return the nodes behind ``taps``: those of the backbone."""
    return reached(parent for tap in taps for parent in inputs(tap))


def tasks_surely_behind(node: Node | None, are_own: AreOwn, *, paused: bool = False) -> set[int]:
    """Return the tasks of the nearest taps, also of those ``paused``, that ``node`` depends on for certain.

    An opaque node depends on a tap for certain if all its inputs are outputs and parameters of one head.
    """
    is_one = is_any_tap if paused else is_tap
    found = reached([node], stop_at=lambda each: is_one(each) or is_opaque(each))
    tasks = {tap.task for tap in filter(is_one, found)}
    for opaque in filter(is_opaque, found):
        inside = reached([opaque], stop_at=is_one)
        of_taps = {tap.task for tap in filter(is_one, inside)}
        if len(of_taps) == 1 and are_own(leaves(inside), *of_taps):
            tasks |= of_taps
    return tasks


def behind_taps(loss: Tensor) -> set[Node]:
    """Return the nodes that ``loss`` reaches through taps."""
    return behind(taps_of([loss.grad_fn]))


def is_tap(node: Node) -> bool:
    """Whether ``node`` is the tap of a head; it then has the attributes ``task`` and ``fork``."""
    return isinstance(node, BackwardCFunction) and isinstance(getattr(node, "fork", None), Fork)


def is_any_tap(node: Node) -> bool:
    """Whether ``node`` is a tap, or a rotation under ``paused()``; it then has the attribute ``task``."""
    return is_tap(node) or (
        isinstance(node, BackwardCFunction) and isinstance(getattr(node, "dims", None), RotatedDims)
    )


def is_opaque(node: Node) -> bool:
    """Whether it is unknown which outputs of ``node`` depend on which inputs, as for a graph compiled as a whole."""
    return isinstance(node, BackwardCFunction) and num_outputs(node) > 1


def is_leaf(node: Node) -> bool:
    """Whether ``node`` represents a parameter, or another leaf that requires grad."""
    return hasattr(node, "variable")


def is_checkpoint(node: Node) -> bool:
    """Whether ``node`` is a re-entrant checkpoint, whose graph is built in the backward pass."""
    return operation(node) == "CheckpointFunction"


def is_sum(node: Node) -> bool:
    """Whether ``node`` adds, multiplies or concatenates tensors."""
    return operation(node) in SUMS


def is_of_each(node: Node) -> bool:
    """Whether ``node`` processes each tensor of a list separately, as ``torch._foreach_norm`` does."""
    return operation(node).startswith("Foreach")


def operation(node: Node) -> str:
    """Return the name of the operation, such as ``"Addmm"``."""
    name: str = node.name()
    return name.partition("Backward")[0]


def leaves(nodes: Iterable[Node]) -> list[Tensor]:
    """Return the parameters among ``nodes``."""
    return [node.variable for node in nodes if is_leaf(node)]


def parameters_of(tensor: Tensor) -> list[Tensor]:
    """Return the parameters that ``tensor`` was computed from, or itself if it is one."""
    return [tensor] if tensor.is_leaf else leaves(reached([tensor.grad_fn]))


def inputs(node: Node) -> list[Node | None]:
    """Return the nodes that computed the inputs of ``node``."""
    return [node for node, _ in edges(node)]


def edges(node: Node) -> list[Edge]:
    """Return the edges of the inputs of ``node``."""
    return [source(*edge) for edge in node.next_functions]


def made_by(loss: Tensor) -> Edge:
    """Return the edge of ``loss``."""
    return source(loss.grad_fn, loss.output_nr)


def source(node: Node | None, output: int) -> tuple[Node | None, int]:
    """Return ``node`` and the index ``output``, or those of the input if the node only passes tensors through."""
    while isinstance(node, BackwardCFunction) and operation(node) in HANDED_ON:
        node, output = node.next_functions[output]
    return node, output


def is_handed_on(tensor: Tensor) -> bool:
    """Whether ``tensor`` only passes another one through, as an output of DistributedDataParallel does."""
    return tensor.grad_fn is not None and operation(tensor.grad_fn) in HANDED_ON


def reaching(nodes: Iterable[Node], targets: Iterable[Node]) -> set[Node]:
    """Return those of ``nodes`` from which ``targets`` can be reached, and these."""
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
