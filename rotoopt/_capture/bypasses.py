"""Ways around the heads: losses that reach shared parameters without passing through a rotation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from torch import Tensor, nn

from rotoopt._capture.dependence import Dependence
from rotoopt._capture.fork import LOSSES_AS_HEADS
from rotoopt._capture.graph import (
    Edge,
    Node,
    behind,
    inputs,
    is_checkpoint,
    is_leaf,
    is_of_each,
    is_sum,
    is_tap,
    leaves,
    operation,
    reached,
    reaching,
    taps_of,
)
from rotoopt._torch.modules import is_trained, names_of, trained_with

OTHER_MODULES = (
    "the task has other modules that read shared tensors, such as an auxiliary classifier or one head per level: list "
    "all, heads={'task': (first, second)}"
)
NOT_CALLED = (
    "a head, or one of several modules of a task, is called as head.forward(z), or in eval mode (call eval() on its "
    "layers instead, such as frozen normalization), or is missing in `heads`"
)
SOMETHING_ELSE = (
    "the loss trains something else, as an actor through its critics: run its forward pass under optimizer.paused()"
)
FROM_GRADIENTS = (
    "the loss was computed from gradients, as in MAML: run its forward and backward pass under optimizer.paused(), and "
    "then optimizer.step() without losses"
)
LAST_SKIP = "of a decoder whose layers add skip connections to their own outputs, list only those after the last one"
ADDED = (
    "It is read by a term that is added to the loss. Either (a) it is a penalty: pass it as backbone_loss, (b) "
    f"{OTHER_MODULES}, (c) {NOT_CALLED}, (d) {SOMETHING_ELSE}, or (e) {FROM_GRADIENTS}."
)
AROUND = (
    "Either (a) a skip connection goes around a head, or the loss compares an output with a shared tensor: move it "
    f"into the head, pass it to the head as an input, or detach() it; {LAST_SKIP}, (b) {OTHER_MODULES}, also for an "
    f"output layer that shares its weight with an embedding, (c) {NOT_CALLED}, (d) a head reads something that is "
    "stored in it, is complex, or is inside an object of a custom class: pass it as an input, "
    f"(e) {SOMETHING_ELSE}, (f) outputs of several heads are combined with shared tensors: {LOSSES_AS_HEADS}, or (g) "
    f"{FROM_GRADIENTS}."
)
BEHIND = (
    "Either (a) a layer is applied to the outputs of several heads: list only later modules as heads, give every task "
    f"its own copy of the layer, or {LOSSES_AS_HEADS}, (b) the parameter belongs to one task: list it there, "
    "heads={'task': (head, parameter)}, (c) it weights losses: multiply the losses by it, not their errors, outside "
    "of compiled graphs, (d) heads read its output inside an object of a custom class, or stored in them: pass it "
    f"as an input, or (e) a skip connection goes around all heads: pass it to them as an input; {LAST_SKIP}."
)


def check_shared(
    dependence: Dependence,
    losses: Mapping[int, Edge],
    names: Sequence[str],
    own: Mapping[int, int],
    terms: Sequence[Edge] = (),
) -> None:
    """Raise if a loss reaches a shared parameter outside of the heads without passing through a head.

    Gradients on such a path are not weighted. Exceptions are parameters that only weight losses, such as log-variances,
    and parameters of which each task reads different entries.

    Args:
        dependence: How the losses depend on the outputs of the heads.
        losses: The nodes of the losses of the present tasks.
        names: Names of the K tasks, for errors.
        own: The tasks by the ids of their parameters.
        terms: The nodes of the terms of a sum of losses, of any tasks.
    """
    check_not_hidden(dependence, [*losses.values(), *terms], names)
    read: dict[int, _Read] = {}
    beside: dict[int, _Read] = {}  # outside of the losses: their weights, and penalties
    of_tasks = [(term, dependence.tasks(term)) for term in terms]
    for task, loss in losses.items():
        found = dependence.terms(loss)
        of_tasks += [(term, {task}) for term in found.of_tasks]
        for param in leaves(reached(node for node, _ in found.of_none)):
            beside.setdefault(id(param), _Read(param)).by(task, None)
    for term, tasks in of_tasks:
        for task in tasks:
            for param, index in dependence.parameters(term, task):
                read.setdefault(id(param), _Read(param)).by(task, index)
    if not read.keys() | beside.keys() <= own.keys():
        roots = [*losses.values(), *terms]
        shared = {id(param) for param in leaves(behind(taps_of(node for node, _ in roots)))}
        around = [
            each
            for key, each in {**beside, **read}.items()
            # Functional heads may share theirs.
            if key not in own and (key in shared or (key in read and own and each.is_shared)) and is_trained(each.param)
        ]
        if around:
            keys = {id(each.param) for each in around} & read.keys()
            causes = ADDED if not keys else AROUND if keys & shared else BEHIND
            raise RuntimeError(_around_the_heads(around, names, causes))


def check_not_bypassed(
    losses: Iterable[Node], taps: Iterable[Node], own: Mapping[int, int], names: Sequence[str]
) -> None:
    """Raise if a loss that passes no tap reads something shared through the parameters of a head.

    Args:
        losses: Nodes of losses that pass no tap.
        taps: The taps of other losses.
        own: The tasks by the ids of their parameters.
        names: Names of the K tasks.
    """
    shared = {id(param) for param in leaves(behind(taps))} - own.keys()
    tasks = [own[id(param)] for param in _applied_to_shared(losses, own.keys(), shared)]
    if tasks:
        raise RuntimeError(not_through_its_head(names[min(tasks)], "none"))


def unlisted_layers(losses: Sequence[Node], taps: Iterable[Node], own: Mapping[int, int]) -> list[Tensor]:
    """Return the parameters of layers that read something shared and are neither in `heads` nor in the backbone.

    Such a layer may be the head of a task that is missing there. Layers with an optimizer of their own, as a
    discriminator, are not.

    Args:
        losses: Nodes of losses that pass no tap.
        taps: The taps of other losses.
        own: The tasks by the ids of their parameters.
    """
    backbone = behind(taps)
    shared = {id(param) for param in leaves(backbone)} - own.keys()
    nodes = reached(losses)
    if any(operation(node) == "CompiledFunction" for node in nodes):  # a penalty looks like a layer there
        return []
    others = {id(param) for param in leaves(nodes)} - own.keys() - shared
    found = _applied_to_shared(losses, others, shared) if others else []
    together = trained_with(shared) if found else set()
    return [*_tied(nodes, backbone, shared), *(param for param in found if id(param) in together)]


def _tied(nodes: Set[Node], backbone: Set[Node], shared: Set[int]) -> list[Tensor]:
    """Return the shared parameters that layers outside of the backbone apply to what it computes.

    Such a layer may be an output layer that shares its weight with an embedding.
    """
    of_backbone = reaching(nodes, [node for node in nodes & backbone if not is_leaf(node)])
    found: dict[int, Tensor] = {}
    for node in of_backbone - backbone:
        if not is_sum(node) and not is_of_each(node):
            weights = [leaves(reached([part])) for part in inputs(node) if part not in of_backbone]
            found |= {id(params[0]): params[0] for params in weights if len(params) == 1 and id(params[0]) in shared}
    return list(found.values())


def _applied_to_shared(losses: Iterable[Node], params: Set[int], shared: Set[int]) -> list[Tensor]:
    """Return those of ``params``, given as ids, that layers apply to something shared."""
    layers: list[Node] = []
    for loss in losses:
        nodes = reached([loss])
        with_own = reaching(nodes, [node for node in nodes if is_leaf(node) and id(node.variable) in params])
        with_shared = reaching(nodes, [node for node in nodes if is_leaf(node) and id(node.variable) in shared])
        for node in with_own & with_shared:
            parts = inputs(node)
            # A penalty on all parameters adds or concatenates them; a layer has an input and a weight.
            meet = any(p in with_own and q in with_shared for p in parts for q in parts if p is not q)
            if meet and not is_sum(node) and not is_of_each(node):
                layers.append(node)
    return [param for param in leaves(reached(layers)) if id(param) in params]


def check_not_hidden(dependence: Dependence, terms: Sequence[Edge], names: Sequence[str]) -> None:
    """Raise if losses share the output of a re-entrant checkpoint that they reach without passing through a head.

    Its parameters are not in the graph, and cannot be found separately.
    """
    past: dict[Node, set[int]] = {}
    for term in terms:
        for node in filter(is_checkpoint, reached([term[0]], stop_at=is_tap)):
            past.setdefault(node, set()).update(dependence.tasks(term) - dependence.tasks((node, 0)))
    if not past:
        return
    shared = behind(taps_of(node for node, _ in terms))
    for node, tasks in past.items():
        if tasks and (node in shared or len(tasks) > 1):
            raise RuntimeError(
                "Losses must reach shared parameters through their heads, got the output of a re-entrant checkpoint, "
                f"which the loss of {names[min(tasks)]} reaches without passing through a head: its gradient is not "
                "weighted there. Move what bypasses the head into it, or pass it to the head as an input. If only a "
                "penalty shares it, pass use_reentrant=False to checkpoint(), which makes its parameters visible."
            )


@dataclass
class _Read:
    """A parameter that is read without passing a tap: by which tasks, and which entry, None for all."""

    param: Tensor
    tasks: dict[int, set[int | None]] = field(default_factory=dict)

    def by(self, task: int, index: int | None) -> None:
        self.tasks.setdefault(task, set()).add(index)

    @property
    def is_shared(self) -> bool:
        """Whether several tasks read one entry."""
        read = [index for indices in self.tasks.values() for index in indices]
        return len(self.tasks) > 1 and (None in read or len(set(read)) < len(read))


def _around_the_heads(reads: Sequence[_Read], names: Sequence[str], causes: str) -> str:
    tasks = sorted({names[task] for read in reads for task in read.tasks})
    who = f"the {'losses' if len(tasks) > 1 else 'loss'} of {' and '.join(tasks)}"
    return (
        "A parameter that tasks share must be reached through their heads, got "
        f"{names_of([read.param for read in reads])}, which "
        f"{who} {'reach' if len(tasks) > 1 else 'reaches'} without passing through a head: gradients are not weighted "
        f"there. {causes}"
    )


def not_through_its_head(name: str, others: str, head: Sequence[nn.Module | nn.Parameter] = ()) -> str:
    """Return the error for a loss that passes through ``others`` instead of the head of ``name``."""
    modes = [part.training for part in head if isinstance(part, nn.Module)]
    if not others and modes and not any(modes):
        return (
            f"Heads must run in training mode, got that of {name} in eval mode, in which gradients are not weighted. "
            "Call model.train() before the forward pass, as after every validation. If layers of a head should stay in "
            "eval mode, such as frozen normalization, call eval() on these, and train() on the head."
        )
    return (
        f"The loss of {name} must pass through its rotated head, got one that passes through: {others or 'none'}. "
        "Either (a) the order of `losses` is not that of the heads, (b) the head was bypassed, as by head.forward(z), "
        "another method, a submodule of it (list that one) or the nn.Sequential that it is a slice of (list its "
        "layers), or was replaced in the model, or a functional head that did not read optimizer.rotate(z), "
        "(c) it ran in eval mode, on z.detach(), under paused() (a gradient penalty: pass it as backbone_loss, or call "
        "its backward() by itself), no_grad(), torch.func.vmap() or re-entrant checkpointing (pass "
        "use_reentrant=False), before the optimizer was built, or after remove() or fold(), or (d) the model was "
        "compiled and run before the optimizer was built: build it first, or call torch._dynamo.reset()."
    )
