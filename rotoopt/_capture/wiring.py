"""Wiring: does every loss pass through its own head, and reach what is shared through heads only?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from rotoopt._capture.fork import SPENT, Fork
from rotoopt._capture.graph import Node, behind, inputs, is_leaf, is_tap, taps_of, without_taps
from rotoopt._capture.hooks import hook_of
from rotoopt._torch.modules import name_of
from rotoopt._torch.private import output_numel


def check_unhooked(heads: Sequence[Sequence[nn.Module]], names: Sequence[str]) -> None:
    """Raise if there is a rotation in front of one of ``heads`` already."""
    for name, modules in zip(names, heads, strict=False):  # functional heads have names only
        if any(hook_of(module) is not None for module in modules):
            raise ValueError(
                f"`heads` must not have rotations yet, got {name} with that of another optimizer. Call remove() on "
                "the other one first (in a notebook: the one made when the cell ran before). To copy a model that is "
                "wrapped, copy both: copy.deepcopy((model, optimizer))."
            )


def forks_behind(losses: Iterable[Tensor]) -> set[Fork]:
    """Return the forks that ``losses`` reach, each through its heads."""
    return {tap.fork for tap in taps_of(loss.grad_fn for loss in losses)}


def check_losses(losses: Mapping[int, Node], names: Sequence[str], own: set[int], backbone: Node | None) -> None:
    """Raise unless every loss was computed by its own head, for the first time, and all of them share through heads.

    Walks the graph of every loss back to the leaves. That costs some microseconds per node, so it is done once for
    every way in which a model was wired.

    Args:
        losses: What made the losses of the present tasks.
        names: How to call the K tasks in an error.
        own: The ids of the parameters of the heads.
        backbone: What made a loss that must not pass through any head.
    """
    taps = {task: taps_of([loss]) for task, loss in losses.items()}
    for task, found in taps.items():
        through = {tap.task for tap in found}
        if task not in through:
            raise RuntimeError(_not_through_its_head(names[task], ", ".join(names[other] for other in sorted(through))))
        if through != {task}:
            other = min(through - {task})
            raise RuntimeError(
                f"The loss of {names[task]} must be computed from the output of its own head, got one that passes "
                f"through that of {names[other]}, too: its gradient would be given two weights. Add each term to the "
                f"loss of its own head, or detach() the output of {names[other]} in the loss of {names[task]}."
            )
    if any(tap.fork.used for found in taps.values() for tap in found):
        raise RuntimeError(SPENT)
    through_backbone = {tap.task for tap in taps_of([backbone])}
    if through_backbone:
        raise RuntimeError(
            f"`backbone_loss` must not pass through a head, got one that passes through "
            f"{names[min(through_backbone)]}. Add it to the loss of that task, or compute it from the representation or "
            "the parameters of the backbone."
        )
    check_heads_apart(set().union(*taps.values()), names)
    check_shared([(names[task], loss) for task, loss in losses.items()], own)


def check_heads_apart(taps: set[Node], names: Sequence[str]) -> None:
    """Raise if a head reads what another one made: its gradient would be weighted once for each of them."""
    for tap in taps:
        for other in filter(is_tap, behind([tap])):
            if other.task == tap.task:
                raise RuntimeError(
                    f"The modules of {names[tap.task]} must be the first ones that belong to it alone, got one that reads "
                    "what another one has made. List the first one only."
                )
            raise RuntimeError(
                f"Heads must read the backbone, got {names[tap.task]}, which reads what the head of {names[other.task]} "
                f"has made: its gradient would be given two weights. Either (a) detach() it on its way, or (b) make what "
                f"{names[tap.task]} reads a part of the backbone: in `heads`, give only the layers of "
                f"{names[other.task]} behind it."
            )


def check_shared(losses: Sequence[tuple[str, Node]], own: set[int]) -> None:
    """Raise if a parameter outside of the heads is shared, and a loss reaches it without passing a head.

    There, nothing weighs its gradient. A parameter that only weighs a loss, as log-variances do, is none of these.

    Args:
        losses: Losses with names, as nodes.
        own: The ids of the parameters of the heads.
    """
    past: dict[int, tuple[Tensor, list[str]]] = {}
    for name, loss in losses:
        for param in _past_heads(loss):
            if id(param) not in own:
                past.setdefault(id(param), (param, []))[1].append(name)
    if not past:
        return
    shared = {id(leaf.variable) for leaf in filter(is_leaf, behind(taps_of(loss for _, loss in losses)))}
    for key, (param, reaching) in past.items():
        if len(reaching) > 1 or key in shared:
            raise RuntimeError(
                f"A parameter that tasks share must be reached through their heads, got {name_of(param)}, which "
                f"{' and '.join(sorted(set(reaching)))} reach without passing a head: nothing weighs its gradient there. "
                "Likely causes: (a) a skip connection goes around a head: put it into the head, or hand what it carries "
                "to the head as an input, (b) a head is called as head.forward(z), (c) a head reads something that was "
                "stored and not handed to it, or is in an object of a class of its own, or (d) a penalty on the backbone "
                "is part of a loss: pass it as backbone_loss. If the parameter belongs to the tasks, list it with them: "
                "heads={'task': (head, parameter)}."
            )


def _past_heads(loss: Node) -> list[Tensor]:
    """Return the parameters that ``loss`` reaches around its heads, but for those that make a single number."""
    around = without_taps(loss)
    found = {
        id(leaf.variable): leaf.variable
        for node in around
        if output_numel(node) != 1
        for leaf in inputs(node)
        if leaf is not None and is_leaf(leaf)
    }
    return list(found.values())


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
