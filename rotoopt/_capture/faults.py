"""Faults of the wiring: losses that do not pass through their heads, or reach what is shared by another way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from rotoopt._capture.fork import SPENT, Fed
from rotoopt._capture.graph import (
    Node,
    behind,
    inputs,
    is_bundle,
    is_leaf,
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
    losses: Mapping[int, Node], names: Sequence[str], own: Mapping[int, int], backbone: Node | None
) -> None:
    """Raise unless every loss was computed by its own head, for the first time, and all of them share through heads.

    Walks the graph of every loss back to the leaves. That costs some microseconds per node, so it is done once for
    every way in which a model was wired.

    Args:
        losses: What made the losses of the present tasks.
        names: How to call the K tasks in an error.
        own: The tasks by the ids of their parameters.
        backbone: What made a loss that must not pass through any head.
    """
    taps = {task: taps_of([loss]) for task, loss in losses.items()}
    for task, found in taps.items():
        through = {tap.task for tap in found}
        if task not in through:
            raise RuntimeError(_not_through_its_head(names[task], ", ".join(names[other] for other in sorted(through))))
        check_not_mixed(losses[task], [task, *sorted(through - {task})], names)
    if any(tap.fork.used for found in taps.values() for tap in found):
        raise RuntimeError(SPENT)
    through_backbone = {tap.task for tap in taps_of([backbone])}
    if through_backbone:
        raise RuntimeError(
            f"`backbone_loss` must not pass through a head, got one that passes through "
            f"{names[min(through_backbone)]}. Add it to the loss of that task, or compute it from the representation "
            "or the parameters of the backbone."
        )
    check_heads_apart(set().union(*taps.values()), names)
    check_shared([(names[task], loss) for task, loss in losses.items()], own)


def check_not_mixed(loss: Node, tasks: Sequence[int], names: Sequence[str]) -> None:
    """Raise if ``loss`` is one of the outputs of several heads, those of ``tasks``."""
    if len(tasks) > 1 and not _is_bundled(loss):
        first, second = names[tasks[0]], names[tasks[1]]
        raise RuntimeError(
            f"The loss of {first} must be computed from the output of its own head, got one that passes through that "
            f"of {second}, too: its gradient would be given two weights. Give each head a loss of its own that the "
            f"others are added to, or detach() the output of {second} in the loss of {first}."
        )


def _is_bundled(loss: Node) -> bool:
    """Whether an operation between ``loss`` and the taps has outputs of several tasks, which may be independent."""
    bundles = filter(is_bundle, reached([loss], stop_at_taps=True))
    return any(len({tap.task for tap in taps_of([bundle])}) > 1 for bundle in bundles if not is_tap(bundle))


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


def check_shared(losses: Sequence[tuple[str, Node]], own: Mapping[int, int]) -> None:
    """Raise if a parameter outside of the heads is shared, and a loss reaches it without passing a head.

    There, nothing weighs its gradient. Parameters that only weigh losses, as log-variances do, are none of these: there
    is at most one number for each.

    Args:
        losses: Losses as nodes, with the names of their tasks; of one task there may be several.
        own: The tasks by the ids of their parameters.
    """
    past: dict[int, tuple[Tensor, set[str]]] = {}
    for name, loss in losses:
        for param in leaves(reached([loss], stop_at_taps=True)):
            if id(param) not in own:
                past.setdefault(id(param), (param, set()))[1].add(name)
    if not past:
        return
    shared = {id(param) for param in leaves(behind(taps_of(loss for _, loss in losses)))}
    num_tasks = len({name for name, _ in losses})
    for key, (param, found) in past.items():
        # Functional heads may share what is theirs.
        is_theirs = key not in shared and (len(found) == 1 or not own or param.numel() <= num_tasks)
        if not is_theirs and is_trained(param):
            several = len(found) > 1
            who = f"the {'losses' if several else 'loss'} of {' and '.join(sorted(found))}"
            raise RuntimeError(
                f"A parameter that tasks share must be reached through their heads, got {name_of(param)}, which "
                f"{who} {'reach' if several else 'reaches'} without passing a head: nothing weighs its gradient there. "
                "Likely causes: (a) a skip connection goes around a head: put it into the head, or hand what it "
                "carries to the head as an input, (b) a head is called as head.forward(z), (c) a head reads something "
                "that was stored and not handed to it, or is in an object of a class of its own, or (d) a penalty on "
                "the backbone is part of a loss: pass it as backbone_loss. If the parameter belongs to the tasks, list "
                "it with them: heads={'task': (head, parameter)}."
            )


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
            if not is_sum(node) and any(p in with_own and q in with_shared for p in parts for q in parts if p is not q):
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
