"""Wiring errors: losses that do not pass through their heads, or through several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from rotoopt._capture.bypasses import check_not_bypassed, check_shared, not_through_its_head
from rotoopt._capture.dependence import Dependence, tasks_behind
from rotoopt._capture.fed import Fed
from rotoopt._capture.fork import LOSSES_AS_HEADS, SPENT
from rotoopt._capture.graph import AreOwn, Edge, Node, edges, inputs, leaves, reached, taps_of
from rotoopt.weighting import Weighting

TWO_OPTIMIZERS = (
    "Gradients would be weighted by both. If the loss trains something else through a head, as a generator through its "
    "discriminator, run that forward pass under paused() of the optimizer of this head."
)


def check_losses(
    dependence: Dependence,
    losses: Mapping[int, Edge],
    fed: Fed,
    names: Sequence[str],
    heads: Sequence[Sequence[nn.Module | nn.Parameter]],
    own: Mapping[int, int],
    are_own: AreOwn,
    backbone: Edge | None,
) -> None:
    """Raise unless every loss was computed by its own head, for the first time, and shares only what enters the heads.

    Walks the graph of every loss back to the leaves. This costs some microseconds per node, so it is done once for
    every way in which a model is wired.

    Args:
        dependence: How the losses depend on the outputs of the heads.
        losses: The nodes of the losses of the present tasks.
        fed: The inputs of the heads.
        names: Names of the K tasks, for errors.
        heads: The modules and parameters of each task alone; empty if they are functions.
        own: The tasks by the ids of their parameters.
        are_own: Returns whether parameters belong to a task alone, and nothing else reads them.
        backbone: The node of a loss that must not pass through any head.
    """
    for task, (node, _) in losses.items():
        if not all(fed.has(tap.fork) for tap in taps_of([node])):
            raise RuntimeError(
                "A loss must pass through heads of the optimizer that it is given to, got that of "
                f"{names[task]}, which passes through a head of another RotoGradOptimizer. {TWO_OPTIMIZERS}"
            )
    for task, loss in losses.items():
        through = dependence.tasks(loss)
        if through and task not in through and fed.is_frozen([task]):  # a probe beside others, in one tensor
            through = Dependence([loss], of_none=True).tasks(loss)
        if task not in through and (through or not (fed.is_frozen([task]) or _trains_only(task, loss, own))):
            others = ", ".join(names[other] for other in sorted(through))
            raise RuntimeError(not_through_its_head(names[task], others, heads[task] if heads else ()))
        if dependence.is_mixed(loss):
            raise RuntimeError(_mixed(dependence, [task, *sorted(through - {task})], names))
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
    check_heads_apart(taps, names, are_own)
    check_shared(dependence, losses, names, own)


def _trains_only(task: int, loss: Edge, own: Mapping[int, int]) -> bool:
    """Whether ``loss`` depends on parameters of ``task`` alone: there is nothing to weight."""
    trained = leaves(reached([loss[0]]))
    return bool(trained) and all(own.get(id(param)) == task for param in trained)


def check_sum(
    dependence: Dependence, roots: Sequence[Edge], names: Sequence[str], own: Mapping[int, int], are_own: AreOwn
) -> set[Node]:
    """The same check for a sum of losses, as far as its terms can be found. Return its taps.

    Args:
        dependence: How they depend on the outputs of the heads.
        roots: The nodes that a backward pass started from.
        names: Names of the K tasks, for errors.
        own: The tasks by the ids of their parameters.
        are_own: As above.
    """
    found = [dependence.terms(root) for root in roots]
    taps = taps_of(node for node, _ in roots)
    if not taps:
        return taps
    for terms in found:
        for node, _ in terms.of_tasks + terms.mixed:
            _check_one_optimizer(taps_of([node]))
        for term in terms.mixed:
            raise RuntimeError(_mixed(dependence, sorted(dependence.tasks(term)), names))
    check_heads_apart(taps, names, are_own)
    check_shared(dependence, {}, names, own, [term for terms in found for term in terms.of_tasks])
    check_not_bypassed([node for terms in found for node, _ in terms.of_none], taps, own, names)
    return taps


def _check_one_optimizer(taps: set[Node]) -> None:
    first, *others = taps
    if not all(other.fork.is_with(first.fork) for other in others):
        raise RuntimeError(
            "A loss must pass through heads of one optimizer, got one that passes through heads of another "
            f"RotoGradOptimizer, too. {TWO_OPTIMIZERS} If all heads read one backbone, build one optimizer with all."
        )


def check_heads_apart(taps: set[Node], names: Sequence[str], are_own: AreOwn) -> None:
    """Raise if a head reads the output of another one: its gradient would be weighted by both.

    What a compiled graph computes between two heads may be part of the one and of the other, and is then unknown.
    """
    if not all(below.fork.is_with(tap.fork) for tap in taps for below in taps_of(inputs(tap))):
        raise RuntimeError(
            "Heads must read the backbone, got one that reads the output of a head of another RotoGradOptimizer. "
            f"{TWO_OPTIMIZERS}"
        )
    sources = [(tap.task, edge) for tap in taps for edge in edges(tap)]
    pairs = [(task, other) for task, edge in sources for other in tasks_behind(edge, are_own)]
    if not pairs:
        return
    reader, read = min(pairs, key=lambda pair: (pair[0] == pair[1], pair))  # another task, if there is one
    if reader == read:
        raise RuntimeError(
            f"An input of a head must always be the representation, or never, got one of {names[reader]} that was the "
            "representation in one call, and computed by the head itself in another. A loop that calls a head on its "
            "own output should be inside of the head. Or pass num_tasks=K instead of `heads`, and start the loop with "
            "the tensor of optimizer.rotate(z)."
        )
    raise RuntimeError(
        f"Heads must read the backbone, got {names[reader]}, which reads an output of the head of {names[read]}: its "
        f"gradient would be given two weights. Either (a) detach() that output, (b) make what {names[reader]} reads a "
        f"part of the backbone: in `heads`, list only the later layers of {names[read]}, (c) if there are none, as for "
        f"the divergence of an autoencoder, pass its loss as backbone_loss, (d) {LOSSES_AS_HEADS}, or (e) if a "
        f"hook takes what enters {names[read]}, which is rotated there, take the output of the layer before."
    )


def check_weighting(weighting: Weighting, fed: Fed, names: Sequence[str], *, one_tensor: bool) -> None:
    """Raise if ``weighting`` needs one tensor that all heads read, and there are several."""
    if weighting.needs_one_tensor and not one_tensor:
        raise RuntimeError(
            f"The weighting {weighting!r} must see the gradients of all tasks at one tensor, got several "
            f"({fed.described(names)}). Either (a) move the layers between one z and these into the heads, or apply "
            "them once before all heads, or (b) use a weighting that adds the gradients: ProgressWeighting(), "
            "RotoGradWeighting(), GradNorm() or EqualWeighting()."
        )


def _mixed(dependence: Dependence, tasks: Sequence[int], names: Sequence[str]) -> str:
    first, second = names[tasks[0]], names[tasks[1]]
    message = (
        f"The loss of {first} must be computed from the output of its own head, got one that passes through that "
        f"of {second}, too: its gradient would be given two weights. Either (a) detach() the output of {second} in the "
        f"loss of {first}, or add that term to the loss of {second} and detach() the output of {first}, (b) if both "
        f"heads must be trained by it, as by a product of their outputs, {LOSSES_AS_HEADS}, (c) if an index or a mask "
        "selects one task for each sample, or parts of joined outputs are replaced, as by out[..., :2] = y, in your "
        "own sum(losses).backward(), call backward(losses) with the loss of each task instead, (d) if the loss "
        "trains something else, as an actor through its critics, run its forward pass under optimizer.paused(), or (e) "
        "if losses were added up in place, as by total = losses[0]; total += losses[1], write total = total + "
        "losses[1]."
    )
    if not dependence.is_compiled:
        return message
    return (
        f"{message} Behind the heads, there is a compiled graph. If it joins their outputs in one tensor, as torch.cat "
        "does, return them separately there: which part of its output comes from which head is not visible."
    )
