"""Faults of the wiring: losses that do not pass through their heads, or reach what is shared by another way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rotoopt._capture.dependence import Dependence
from rotoopt._capture.fork import SPENT, Fed
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
    reached,
    reaching,
    taps_of,
)
from rotoopt._torch.modules import is_trained, name_of
from rotoopt.weighting import Weighting


def check_losses(
    losses: Mapping[int, Edge], fed: Fed, names: Sequence[str], own: Mapping[int, int], backbone: Edge | None
) -> None:
    """Raise unless every loss was computed by its own head, for the first time, and all of them share through heads.

    Walks the graph of every loss back to the leaves. That costs some microseconds per node, so it is done once for
    every way in which a model was wired.

    Args:
        losses: What made the losses of the present tasks.
        fed: What the heads were fed.
        names: How to call the K tasks in an error.
        own: The tasks by the ids of their parameters.
        backbone: What made a loss that must not pass through any head.
    """
    dependence = Dependence(losses.values())
    for task, loss in losses.items():
        through = dependence.tasks(loss)
        if task not in through and (through or not fed.is_frozen([task])):
            raise RuntimeError(_not_through_its_head(names[task], ", ".join(names[other] for other in sorted(through))))
        if dependence.is_mixed(loss):
            raise RuntimeError(_mixed([task, *sorted(through - {task})], names))
    taps = taps_of(node for node, _ in losses.values())
    if any(tap.fork.used for tap in taps):
        raise RuntimeError(SPENT)
    through_backbone = {tap.task for tap in taps_of([None if backbone is None else backbone[0]])}
    if through_backbone:
        raise RuntimeError(
            f"`backbone_loss` must not pass through a head, got one that passes through "
            f"{names[min(through_backbone)]}. Add it to the loss of that task, or compute it from the representation "
            "or the parameters of the backbone."
        )
    check_heads_apart(taps, names)
    check_shared(dependence, losses, names, own)


def check_sum(roots: Sequence[Edge], names: Sequence[str], own: Mapping[int, int]) -> set[Node]:
    """The same for a sum of losses, as far as it can be taken apart. Return its taps.

    Args:
        roots: What a backward pass began from.
        names: How to call the K tasks in an error.
        own: The tasks by the ids of their parameters.
    """
    dependence = Dependence(roots)
    found = [dependence.terms(root) for root in roots]
    taps = taps_of(node for node, _ in roots)
    if not taps:
        return taps
    for terms in found:
        for term in terms.mixed:
            raise RuntimeError(_mixed(sorted(dependence.tasks(term)), names))
    check_heads_apart(taps, names)
    check_shared(dependence, {}, names, own, [term for terms in found for term in terms.of_tasks])
    check_not_bypassed([node for terms in found for node, _ in terms.of_none], taps, own, names)
    return taps


def check_heads_apart(taps: set[Node], names: Sequence[str]) -> None:
    """Raise if a head reads what another one made: its gradient would be weighted once for each of them."""
    if not any(map(is_tap, behind(taps))):
        return
    for tap in taps:
        for other in filter(is_tap, behind([tap])):
            if other.task == tap.task:
                raise RuntimeError(
                    f"The modules of {names[tap.task]} must be the first ones that belong to it alone, got one that "
                    "reads what another one, or an earlier call of it, has made. List the first one only; a loop that "
                    "calls a head on its own output belongs inside of the head."
                )
            raise RuntimeError(
                f"Heads must read the backbone, got {names[tap.task]}, which reads what the head of "
                f"{names[other.task]} has made: its gradient would be given two weights. Either (a) detach() it on its "
                f"way, or (b) make what {names[tap.task]} reads a part of the backbone: in `heads`, give only the "
                f"layers of {names[other.task]} behind it."
            )


def check_shared(
    dependence: Dependence,
    losses: Mapping[int, Edge],
    names: Sequence[str],
    own: Mapping[int, int],
    terms: Sequence[Edge] = (),
) -> None:
    """Raise if a parameter outside of the heads is shared, and a loss reaches it without passing a head.

    There, nothing weighs its gradient. Parameters that only weigh losses, as log-variances do, are none of these, nor
    are those of which each task reads numbers of its own.

    Args:
        dependence: How the losses depend on the outputs of the heads.
        losses: What made the losses of the present tasks.
        names: How to call the K tasks in an error.
        own: The tasks by the ids of their parameters.
        terms: What made terms of a sum of losses, of whatever tasks.
    """
    check_not_hidden(dependence, [*losses.values(), *terms], names)
    read: dict[int, _Read] = {}
    beside: dict[int, _Read] = {}  # the losses: their weights, and penalties
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
        for key in (read.keys() | beside.keys()) - own.keys():
            each = read.get(key)
            if key in shared or (each is not None and own and each.is_shared):  # functional heads may share theirs
                each = each or beside[key]
                if is_trained(each.param):
                    raise RuntimeError(_around_the_heads(each, [names[task] for task in sorted(each.tasks)]))


def check_not_hidden(dependence: Dependence, terms: Sequence[Edge], names: Sequence[str]) -> None:
    """Raise if losses reach what a re-entrant checkpoint made without passing a head, and share it.

    Its parameters are not in the graph: by themselves they cannot be found.
    """
    past: dict[Node, set[int]] = {}
    for term in terms:
        for node in filter(is_checkpoint, reached([term[0]], stop_at_taps=True)):
            past.setdefault(node, set()).update(dependence.tasks(term) - dependence.tasks((node, 0)))
    if not past:
        return
    shared = behind(taps_of(node for node, _ in terms))
    for node, tasks in past.items():
        if tasks and (node in shared or len(tasks) > 1):
            raise RuntimeError(
                "What tasks share must be reached through their heads, got the output of a re-entrant checkpoint, "
                f"which the loss of {names[min(tasks)]} reaches without passing a head: nothing weighs its gradient "
                "there. Put what goes around the head into it, or hand it to the head as an input. If it is shared by "
                "nothing but a penalty, pass use_reentrant=False to checkpoint(), which shows what it is made of."
            )


@dataclass
class _Read:
    """A parameter that is read without passing a tap: by which tasks, and which of its numbers, None for all."""

    param: Tensor
    tasks: dict[int, set[int | None]] = field(default_factory=dict)

    def by(self, task: int, index: int | None) -> None:
        self.tasks.setdefault(task, set()).add(index)

    @property
    def is_shared(self) -> bool:
        """Whether several tasks read one number."""
        read = [index for indices in self.tasks.values() for index in indices]
        return len(self.tasks) > 1 and (None in read or len(set(read)) < len(read))


def check_not_bypassed(
    losses: Iterable[Node], taps: Iterable[Node], own: Mapping[int, int], names: Sequence[str]
) -> None:
    """Raise if a loss that passes no tap takes something shared through the parameters of a head.

    Args:
        losses: Losses that pass no tap, as nodes.
        taps: Those that other losses pass.
        own: The tasks by the ids of their parameters.
        names: How to call the K tasks.
    """
    shared = {id(param) for param in leaves(behind(taps))} - own.keys()
    for loss in losses:
        nodes = reached([loss])
        with_own = reaching(nodes, [node for node in nodes if is_leaf(node) and id(node.variable) in own])
        with_shared = reaching(nodes, [node for node in nodes if is_leaf(node) and id(node.variable) in shared])
        for node in with_own & with_shared:
            parts = inputs(node)
            # A penalty on all parameters adds them up, or puts them together; a layer takes an input and a weight.
            meet = any(p in with_own and q in with_shared for p in parts for q in parts if p is not q)
            if meet and not is_sum(node) and not is_of_each(node):
                param = next(param for param in leaves(reached([node])) if id(param) in own)
                raise RuntimeError(_not_through_its_head(names[own[id(param)]], "none"))


def check_weighting(weighting: Weighting, fed: Fed, names: Sequence[str], *, one_tensor: bool) -> None:
    """Raise if ``weighting`` needs one tensor that all heads read, and there are several."""
    if weighting.needs_one_tensor and not one_tensor:
        raise RuntimeError(
            f"The weighting {weighting!r} must see the gradients of all tasks at one tensor, got several "
            f"({fed.described(names)}). Either (a) do what stands between them and one z inside of the heads, or once "
            "before all of them, or (b) take a weighting that adds the gradients up: ProgressWeighting(), "
            "RotoGradWeighting(), GradNorm() or EqualWeighting()."
        )


def _around_the_heads(read: _Read, names: Sequence[str]) -> str:
    several = len(names) > 1
    who = f"the {'losses' if several else 'loss'} of {' and '.join(sorted(names))}"
    return (
        f"A parameter that tasks share must be reached through their heads, got {name_of(read.param)}, which "
        f"{who} {'reach' if several else 'reaches'} without passing a head: nothing weighs its gradient there. "
        "Likely causes: (a) a skip connection goes around a head: put it into the head, or hand what it "
        "carries to the head as an input, (b) a head is called as head.forward(z), (c) a head reads something "
        "that was stored and not handed to it, or is in an object of a class of its own, (d) a penalty on "
        "the backbone is part of a loss: pass it as backbone_loss, or (e) a layer is applied to the outputs of "
        "several heads: give every task a copy of its own, in `heads`. A loss that was computed from gradients, as in "
        "MAML, cannot be weighted: run its forward and backward under optimizer.paused(), and then optimizer.step() "
        "without losses. If the parameter belongs to one task, list it "
        "there: heads={'task': (head, parameter)}. To weigh losses by it, multiply the losses, and not their errors."
    )


def _mixed(tasks: Sequence[int], names: Sequence[str]) -> str:
    first, second = names[tasks[0]], names[tasks[1]]
    return (
        f"The loss of {first} must be computed from the output of its own head, got one that passes through that "
        f"of {second}, too: its gradient would be given two weights. Give each head a loss of its own that the "
        f"others are added to, or detach() the output of {second} in the loss of {first}."
    )


def _not_through_its_head(name: str, others: str) -> str:
    return (
        f"The loss of {name} must pass through its rotated head, got one that passes through: {others or 'none'}. "
        "Either (a) `losses` are in another order than the heads, (b) the head was bypassed, as by "
        "head.forward(z), a submodule of it, or a functional head that was not fed by optimizer.rotate(z), "
        "(c) it ran in eval mode, on z.detach(), under paused(), no_grad(), torch.func.vmap() or re-entrant "
        "checkpointing (pass use_reentrant=False), before the optimizer was built, or after remove() or "
        "fold(), or (d) the model was compiled and run before the optimizer was built: build it first, or call "
        "torch._dynamo.reset()."
    )
