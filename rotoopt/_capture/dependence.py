"""Dependence: which tasks a loss depends on, whether it mixes their outputs, and which parameters it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rotoopt._capture.graph import (
    AreOwn,
    Edge,
    Node,
    behind,
    edges,
    is_leaf,
    is_opaque,
    is_tap,
    leaves,
    operation,
    reached,
    reaching,
    tasks_surely_behind,
)
from rotoopt._capture.labels import (
    ALONG,
    ELEMENTWISE,
    MATRIX_PRODUCTS,
    MIXED,
    NONE,
    REARRANGING,
    REDUCING,
    RESHAPING,
    UNTOLD,
    labels_of_outputs,
    labels_of_sum,
    reduced,
    whole,
)
from rotoopt._capture.moves import BY_VALUES, PICKS, WRITES
from rotoopt._torch.private import ASSIGNMENT, is_on_host, output_shapes, saved

# Linear in all inputs, or in the only one that depends on a task.
LINEAR = {"Add", "Sub", "Rsub", "Neg", "Sum", "Mean", "Stack", "Cat", "Clone", "ToCopy", "Expand", "Where"}
LINEAR |= {"Alias", "MaskedFill", "IndexPut", "IndexCopy", "IndexAdd", "MaskedScatter", "Scatter", "ScatterAdd"}
LINEAR |= {"Nansum"} | PICKS | REARRANGING
PRODUCTS = {"Mul", "Div", "Dot", "Mv", "Mm", "Bmm"}
FEW = 4096  # entries, which may be losses
COMPILED = "CompiledFunction"  # a graph that was compiled as a whole


@dataclass
class Terms:
    """The terms of a loss.

    Attributes:
        of_tasks: Terms that depend on tasks, with each entry depending on one.
        of_none: Terms that depend on no task, such as penalties and weights of losses.
        mixed: Terms with entries that depend on several tasks.
    """

    of_tasks: list[Edge] = field(default_factory=list)
    of_none: list[Edge] = field(default_factory=list)
    mixed: list[Edge] = field(default_factory=list)


class Dependence:
    """How losses depend on the outputs of the heads, according to the graph.

    A sum of terms that each depend on one task keeps the tasks apart: with ``((out - y) ** 2).mean()`` every head gets
    its own gradient, even if ``out`` is made of the outputs of several. The same holds for any function of losses. A
    distance between two outputs mixes them.

    Args:
        roots: The nodes of the losses.
        known: The operations of a graph that was checked before. If they are the same, indices and masks are not read
            from a device, so that nothing waits for it: what they select from the outputs of several heads is unknown.
        of_none: Whether to distinguish entries that depend on one task from those that depend on none, which takes
            longer.

    Attributes:
        operations: The names of the operations, from the taps on.
        unknown: Compiled graphs between the heads, which compute what enters one of them and something else. What
            depends on what in them is unknown.
    """

    def __init__(self, roots: Iterable[Edge], known: Sequence[str] | None = None, *, of_none: bool = False) -> None:
        self._of_none = of_none
        self._order = _from_taps([node for node, _ in roots if node is not None])
        self.operations = list(map(operation, self._order))
        self._reads = self.operations != known
        self.unknown = _unknown(self._order)
        self._masks: dict[Node, int] = {}  # the tasks, as bits
        self._labels: dict[Node, list[Tensor]] = {}  # for nodes that depend on several tasks
        self._numbers: set[Node] = set()  # losses, or vectors of losses
        for node in self._order:
            self._masks[node] = self._mask(node)
            if self._is_joint(node):
                self._labels[node] = self._labels_of(node)
            if self._masks[node] and self._is_number(node):
                self._numbers.add(node)

    @property
    def is_compiled(self) -> bool:
        """Whether a compiled graph combines the outputs of several heads."""
        return any(operation(node) == COMPILED for node in self._labels)

    def tasks(self, root: Edge) -> set[int]:
        """Return the tasks whose outputs ``root`` depends on."""
        node, output = root
        mask = self._masks.get(node, 0)
        if node in self._labels:
            found = set(torch.unique(self._labels[node][output]).tolist())
            if not found & {MIXED, UNTOLD}:
                return found - {NONE}
        return {task for task in range(mask.bit_length()) if mask >> task & 1}

    def is_mixed(self, root: Edge) -> bool:
        """Whether an entry of ``root`` depends on several tasks."""
        node, output = root
        return node in self._labels and bool((self._labels[node][output] == MIXED).any())

    def terms(self, root: Edge) -> Terms:
        """Return the terms of a sum of losses, or of another function of them."""
        found, seen, stack = Terms(), {root}, [root]
        while stack:
            each = node, _ = stack.pop()
            if node is None:
                continue
            parts = edges(node)
            with_task = [part for part in parts if self._masks.get(part[0], 0)]
            if not self._masks[node]:
                found.of_none.append(each)
            elif not is_tap(node) and (
                all(part[0] in self._numbers for part in with_task)
                or (self.is_mixed(each) and self._is_linear(node, with_task, parts))
            ):
                new = [part for part in parts if part not in seen and part[0] is not None and not is_leaf(part[0])]
                seen.update(new)
                stack.extend(new)
            elif self.is_mixed(each) and not (_is_compiled_number(node) or self._adds_up_apart(node, parts)):
                found.mixed.append(each)
            else:
                found.of_tasks.append(each)
        return found

    def parameters(self, term: Edge, task: int) -> Iterator[tuple[Tensor, int | None]]:
        """Yield the parameters that ``task`` reads in ``term`` without passing a tap.

        Each comes with the index of the only entry that is read, None for all. Parameters with an entry for each task,
        for example for each column of concatenated outputs, are left out.
        """
        stack, seen = [term], {term}
        while stack:
            node, _ = stack.pop()
            if is_tap(node):
                continue
            for part in edges(node):
                if part in seen or part[0] is None:
                    continue
                seen.add(part)
                if not self._masks[part[0]]:
                    if node not in self.unknown:
                        yield from self._parameters_beside(node, part)
                elif task in self.tasks(part):
                    stack.append(part)

    # ------------------------------------------------------------------ the graph, from the taps on

    def _mask(self, node: Node) -> int:
        if is_tap(node):
            return 1 << int(node.task)
        mask = 0
        for part, _ in edges(node):
            mask |= self._masks.get(part, 0)
        return mask

    def _is_joint(self, node: Node) -> bool:
        if is_tap(node) or not self._masks[node]:
            return False
        # Outputs of other tasks may be added to the entries that are zero, as to a vector or matrix of losses.
        name = operation(node)
        adds = name == "IndexAdd" or (name == ASSIGNMENT and torch.Size(output_shapes(node)[0]).numel() <= FEW)
        return self._masks[node].bit_count() > 1 or self._of_none or adds

    def _label(self, edge: Edge) -> Tensor:
        """Return the labels of the tensor at ``edge``."""
        node, output = edge
        if node in self._labels:
            return self._labels[node][output]
        shapes = output_shapes(node)
        return whole(self._masks.get(node, 0).bit_length() - 1, shapes[output] if shapes else ())

    def _labels_of(self, node: Node) -> list[Tensor]:
        name, parts, shapes = operation(node), edges(node), output_shapes(node)
        if is_opaque(node) or (not self._reads and name in BY_VALUES and not is_on_host(node)):
            return [whole(UNTOLD, shape) for shape in shapes]
        return labels_of_outputs(node, name, [self._label(part) for part in parts], [_shape(p) for p in parts])

    def _is_number(self, node: Node) -> bool:
        """Whether ``node`` computes one or several losses by adding over samples; not the output of a head."""
        name, shapes = operation(node), output_shapes(node)
        if is_tap(node) or not shapes or any(len(shape) > 1 for shape in shapes):
            return False
        if name in ELEMENTWISE | REARRANGING | ALONG | WRITES | {"Stack", "Cat"}:
            return all(part in self._numbers for part, _ in edges(node) if self._masks.get(part, 0))
        if shapes[0]:  # errors averaged over the samples, one for each task
            return name in REDUCING and self._is_joint(node) and not self.is_mixed((node, 0))
        return True

    def _is_linear(self, node: Node, with_task: Sequence[Edge], parts: Sequence[Edge]) -> bool:
        name = operation(node)
        if name in PRODUCTS:
            return len(with_task) == 1 and (name != "Div" or with_task[0] == parts[0])
        return name in LINEAR

    def _adds_up_apart(self, node: Node, parts: Sequence[Edge]) -> bool:
        summed = labels_of_sum(node, operation(node), [self._label(part) for part in parts])
        return summed is not None and not bool((summed == MIXED).any())

    # ------------------------------------------------------------------ parameters

    def _parameters_beside(self, node: Node, part: Edge) -> Iterator[tuple[Tensor, int | None]]:
        """Yield the parameters that ``part``, which depends on no task, brings into ``node``, which does."""
        param, index = _from_parameter(part)
        if param is not None and index is not None:
            yield param, index
        elif param is None or not self._is_apart_in(node, part):
            yield from ((leaf, None) for leaf in leaves(reached([part[0]])))

    def _is_apart_in(self, node: Node, part: Edge) -> bool:
        """Whether each entry of the parameter that ``part`` was computed from is combined with one task in ``node``."""
        if node not in self._labels or operation(node) not in ELEMENTWISE | MATRIX_PRODUCTS:
            return False
        labels = self._labels[node][0]
        while (shape := _shape(part)) is not None:
            labels = _of_input(labels, node, shape)
            if is_leaf(part[0]):
                return bool((labels >= NONE).all())
            node = part[0]
            (part,) = (each for each in edges(node) if each[0] is not None)
        return False


def tasks_behind(edge: Edge, are_own: AreOwn, *, paused: bool = False) -> set[int]:
    """Return the tasks that ``edge`` depends on for certain; a part of joined outputs depends on that part alone.

    Args:
        edge: The edge of an input of a head.
        are_own: Returns whether parameters belong to a task alone.
        paused: Whether rotations under ``paused()`` count as taps, too. Joined outputs are then not told apart.
    """
    tasks = tasks_surely_behind(edge[0], are_own, paused=paused)
    return tasks & Dependence([edge], of_none=True).tasks(edge) if tasks and not paused else tasks


def _from_taps(roots: Sequence[Node]) -> list[Node]:
    """Return the nodes between ``roots`` and the taps, in topological order, starting with taps and leaves."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if not is_tap(node):
                stack.extend((part, False) for part, _ in edges(node) if part is not None)
    return order


def _unknown(order: Sequence[Node]) -> set[Node]:
    """Return the opaque nodes between the taps in ``order`` and others behind them, not those of the backbone."""
    nodes = behind(filter(is_tap, order))
    opaque = set(filter(is_opaque, nodes))
    return opaque & reaching(nodes, filter(is_tap, nodes)) if opaque else opaque


def _is_compiled_number(node: Node) -> bool:
    """Whether ``node`` computes a number in a compiled graph, such as a sum of losses."""
    return operation(node) == COMPILED and output_shapes(node) == [()]


def _shape(edge: Edge) -> tuple[int, ...] | None:
    node, output = edge
    if node is None:
        return None
    shapes = output_shapes(node)
    return shapes[output] if shapes else None


def _of_input(labels: Tensor, node: Node, shape: tuple[int, ...]) -> Tensor:
    """Return which tasks each entry of an input of ``node`` is combined with, from the labels of its output."""
    name = operation(node)
    if name in RESHAPING:
        return labels.expand(output_shapes(node)[0]).reshape(shape)
    if name == "Permute":
        return labels.permute(torch.tensor(saved(node, "dims")).argsort().tolist())
    if name == "Transpose":
        return labels.transpose(saved(node, "dim0"), saved(node, "dim1"))
    if name in MATRIX_PRODUCTS:  # each entry of a matrix is combined with a row or column of the other one
        labels = reduced(labels, (-2, -1), keepdim=True)
    added = labels.ndim - len(shape)
    labels = reduced(labels, range(added), keepdim=False)
    return reduced(labels, [i for i, size in enumerate(shape) if size == 1], keepdim=True)


def _from_parameter(edge: Edge) -> tuple[Tensor | None, int | None]:
    """Return the parameter that ``edge`` was computed from elementwise, and the index of an entry, None for all."""
    index, size = None, None
    node, output = edge
    while not is_leaf(node):
        parts = [part for part in edges(node) if part[0] is not None]
        name = operation(node)
        if name == "Unbind" or (name == "Select" and len(saved(node, "self_sym_sizes")) == 1):
            index = output if name == "Unbind" else saved(node, "index")
            size = torch.Size(_shape(parts[0]) or ()).numel()
        elif name not in ELEMENTWISE | RESHAPING | {"Permute", "Transpose"}:
            return None, None
        if len(parts) != 1:
            return None, None
        node, output = parts[0]
    return (None, None) if size not in (None, node.variable.numel()) else (node.variable, index)
