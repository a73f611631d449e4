"""Wiring: does every loss pass through its own head, and reach what is shared through heads only?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

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
    made_by,
    operation,
    reached,
    reaching,
    source,
    taps_of,
    terms,
)
from rotoopt._capture.places import Places
from rotoopt._torch.modules import is_trained, name_of
from rotoopt._torch.private import running_roots
from rotoopt.weighting import Weighting

LOOK_EVERY = 16


class Wiring:
    """How the losses of a model hang together: checked once for every set of tasks, and remembered.

    Args:
        names: How to call the K tasks.
        heads: What belongs to each task alone, if it is known.
        places: Where tensors enter the heads.
    """

    def __init__(
        self, names: Sequence[str], heads: Sequence[Sequence[nn.Module | nn.Parameter]], places: Places
    ) -> None:
        self._names = names
        self._heads = heads
        self._places = places
        self._one_tensor: dict[frozenset[int], bool] = {}
        self._made_by: dict[frozenset[int], list[str]] = {}  # the latest operations of the losses
        self._num_known: Counter[frozenset[int]] = Counter()

    def check(self, losses: Mapping[int, Tensor], fed: Fed, backbone_loss: Tensor | None) -> bool:
        """Return whether ``losses`` reach one tensor through their heads, and no other; raise if wired wrongly."""
        tasks = frozenset(losses)
        made_by_now = [operation(loss.grad_fn) for loss in losses.values() if loss.grad_fn is not None]
        known = self._known(tasks, fed)
        if known is not None and self._made_by.get(tasks) == made_by_now:
            return known
        self._made_by[tasks] = made_by_now
        made = {task: made_by(loss) for task, loss in losses.items()}
        backbone = None if backbone_loss is None else made_by(backbone_loss)
        check_losses(made, self._names, self._own_parameters(), backbone)
        return self._remember(tasks, made.values())

    def check_frozen(self, losses: Mapping[int, Tensor]) -> None:
        """Raise if ``losses`` share parameters, although nothing that entered their heads requires grad."""
        if self._num_known[frozenset()] % LOOK_EVERY == 0:
            made = [(self._names[task], made_by(loss)) for task, loss in losses.items()]
            check_shared(made, self._own_parameters())
        self._num_known[frozenset()] += 1

    def check_running(self, fed: Fed) -> bool:
        """The same for a backward pass that the user calls, as far as a sum of losses tells."""
        tasks = fed.trained()
        known = self._known(tasks, fed)
        if known is not None:
            return known
        losses = {
            loss
            for root in running_roots()
            for loss in terms(source(root.grad_fn, root.output_nr)[0], len(self._names))
        }
        taps = {loss: taps_of([loss]) for loss in losses}
        if not any(taps.values()):  # where torch does not tell what the pass began from
            return fed.only_fork() is not None
        through = {loss: sorted({tap.task for tap in taps[loss]}) for loss in losses}
        for loss, mixed in through.items():
            if len(mixed) > 1 and not is_bundled(loss):
                raise RuntimeError(_mixed(self._names[mixed[0]], self._names[mixed[1]]))
        check_heads_apart(set().union(*taps.values()), self._names)
        own = self._own_parameters()
        check_shared([(self._names[tasks[0]], loss) for loss, tasks in through.items() if tasks], own)
        check_not_bypassed([loss for loss in losses if not taps[loss]], set().union(*taps.values()), own, self._names)
        return self._remember(tasks, losses)

    def _known(self, tasks: frozenset[int], fed: Fed) -> bool | None:
        """Return whether ``tasks`` share one tensor, if that can be told without looking at graphs.

        These are looked at now and then nevertheless: a loss may change on its way, as terms come in one by one.
        """
        self._num_known[tasks] += 1
        if self._num_known[tasks] % LOOK_EVERY == 0:
            return None
        if tasks not in self._one_tensor or not fed.trained() >= tasks:
            return None
        only = fed.only_fork()
        one_tensor = only is not None and only.tasks >= tasks
        return one_tensor if one_tensor == self._one_tensor[tasks] else None

    def _remember(self, tasks: frozenset[int], losses: Iterable[Node]) -> bool:
        taps, own = taps_of(losses), self._own_parameters()
        for tap in taps:
            made_of = leaves(behind([tap]))
            if made_of and all(own.get(id(param)) == tap.task for param in made_of):
                self._places.own.add((tap.task, tap.place))  # nothing to weigh there
        self._one_tensor[tasks] = len({tap.fork for tap in taps}) == 1
        return self._one_tensor[tasks]

    def _own_parameters(self) -> dict[int, int]:
        """Return the tasks by the ids of the parameters that belong to them alone."""
        parts = [(part, task) for task, head in enumerate(self._heads) for part in head]
        return {
            id(param): task
            for part, task in parts
            for param in ([part] if isinstance(part, nn.Parameter) else part.parameters())
        }


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
        if through != {task} and not is_bundled(losses[task]):
            other = min(through - {task})
            raise RuntimeError(_mixed(names[task], names[other]))
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


def is_bundled(loss: Node) -> bool:
    """Whether something lies between ``loss`` and the taps that has outputs of several tasks, it may be apart."""
    bundles = filter(is_bundle, reached([loss], stop_at_taps=True))
    return any(len({tap.task for tap in taps_of([bundle])}) > 1 for bundle in bundles if not is_tap(bundle))


def check_heads_apart(taps: set[Node], names: Sequence[str]) -> None:
    """Raise if a head reads what another one made: its gradient would be weighted once for each of them."""
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
        losses: Losses with names, as nodes.
        own: The tasks by the ids of their parameters.
    """
    past: dict[int, tuple[Tensor, list[str]]] = {}
    for name, loss in losses:
        for param in _past_heads(loss):
            if id(param) not in own:
                past.setdefault(id(param), (param, []))[1].append(name)
    if not past:
        return
    shared = {id(leaf.variable) for leaf in filter(is_leaf, behind(taps_of(loss for _, loss in losses)))}
    for key, (param, found) in past.items():
        # Functional heads may share what is theirs.
        is_theirs = key not in shared and (len(found) == 1 or not own or param.numel() <= len(losses))
        if not is_theirs and is_trained(param):
            several = len(set(found)) > 1
            who = f"the {'losses' if several else 'loss'} of {' and '.join(sorted(set(found)))}"
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
            f"The weighting {weighting!r} must see the gradients of all tasks at one tensor, got several tensors that "
            f"enter the heads. {fed.described(names)}. Either (a) do what stands between them and one z inside of the "
            "heads, or once before all of them, or (b) take a weighting that adds the gradients up: "
            "RotoGradWeighting(), GradNorm() or EqualWeighting()."
        )


def _mixed(first: str, second: str) -> str:
    return (
        f"The loss of {first} must be computed from the output of its own head, got one that passes through that of "
        f"{second}, too: its gradient would be given two weights. Give each head a loss of its own that the others are "
        f"added to, or detach() the output of {second} in the loss of {first}."
    )


def _past_heads(loss: Node) -> list[Tensor]:
    """Return the parameters that ``loss`` reaches without passing a head."""
    found = {id(leaf): leaf for leaf in leaves(reached([loss], stop_at_taps=True))}
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
