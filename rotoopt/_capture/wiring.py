"""Wiring: how the losses depend on the heads, checked once for every set of inputs, and occasionally again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from rotoopt._capture.bypasses import unlisted_layers
from rotoopt._capture.dependence import Dependence
from rotoopt._capture.faults import check_losses, check_sum
from rotoopt._capture.fed import Fed, Read
from rotoopt._capture.graph import Node, behind, leaves, made_by, operation, taps_of
from rotoopt._capture.places import Places
from rotoopt._torch.modules import names_of
from rotoopt._torch.private import running_inputs, running_roots
from rotoopt._torch.warn import warn_user

LOOK_EVERY = 17  # a prime number, to check every step of a cycle, such as labeled and unlabeled batches

UNKNOWN = (
    "The wiring must be visible in the autograd graph to be checked, got a compiled graph that computes what enters a "
    "head and something else at once. If a head read the output of another one there, or a loss went around its head, "
    "gradients would be weighted incorrectly without an error. To be certain, call rotoopt.testing.check_invariants, "
    "or run a step without torch.compile."
)
OF_DATA = (
    "A backward pass through heads in training mode should train parameters, got torch.autograd.grad() with respect to "
    "data: this gradient was weighted, and counts as that of a loss. For adversarial examples, saliency maps and the "
    "like, run the forward pass under optimizer.paused(), or in eval mode."
)
MEASURED = (
    "A backward pass through heads in training mode should train parameters, got torch.autograd.grad() and another "
    "backward pass through the same forward pass: this gradient was weighted, and counts as that of a loss. If it is a "
    "measurement, optimizer.last_step may have it; for others, run a forward pass under optimizer.paused()."
)
UNLISTED = (
    "Every task should have a head in `heads`, got a term of a loss that passes through none of these, but applies a "
    "layer outside of the backbone to something shared, {params}: its gradient is not weighted. If it is the loss of a "
    "task, list its head, or, if heads are functions, let it read optimizer.rotate(z). If it is a regularizer, ignore "
    "this."
)


class Wiring:
    """How the losses depend on the heads: checked once for every set of tasks and inputs of their heads, and cached.

    Args:
        names: Names of the K tasks.
        heads: The modules and parameters of each task alone, if known.
        places: Where tensors enter the heads.
    """

    def __init__(
        self, names: Sequence[str], heads: Sequence[Sequence[nn.Module | nn.Parameter]], places: Places
    ) -> None:
        self._names = names
        self._heads = heads
        self._places = places
        self._one_tensor: dict[frozenset[Read], bool] = {}
        self._made_by: dict[frozenset[Read], list[str]] = {}  # the latest operations of the losses
        self._operations: dict[frozenset[Read], list[str]] = {}  # all operations when the losses were checked
        self._num_known: Counter[frozenset[Read]] = Counter()
        self._shared: list[Tensor] = []
        self._joined: set[frozenset[Read]] = set()  # losses have read some parts of the joined outputs of heads
        self._warned = self._found_unlisted = self._found_data = self._found_measured = False
        self._tied: set[int] = set()  # ids of parameters of a task that others read as well

    def check(self, losses: Mapping[int, Tensor], fed: Fed, backbone_loss: Tensor | None) -> bool:
        """Return whether ``losses`` reach one tensor through their heads, and no other; raise if wired incorrectly."""
        reads = fed.read_by(losses)  # the losses of other tasks only train their heads
        given = losses.values() if backbone_loss is None else [*losses.values(), backbone_loss]
        made_by_now = [operation(loss.grad_fn) for loss in given if loss.grad_fn is not None]
        known = self._known(reads, fed)
        if known is not None and self._made_by.get(reads) == made_by_now:
            return known
        accepted = self._one_tensor.pop(reads, None) is not None  # rejected losses are checked in full again
        made = {task: made_by(loss) for task, loss in losses.items()}
        backbone = None if backbone_loss is None else made_by(backbone_loss)

        def check(operations: Sequence[str] | None) -> None:
            dependence = Dependence(made.values(), operations)
            own = self._own_parameters()
            check_losses(dependence, made, fed, self._names, self._heads, own, self.are_own, backbone)
            self._warn_of_unknown(dependence)
            self._operations[reads] = dependence.operations

        before = self._operations.get(reads) if accepted else None
        if before is None or not _passes(partial(check, before)):
            check(None)  # reads all indices: one that was not read may be needed
        self._made_by[reads] = made_by_now
        return self._remember(reads, taps_of(node for node, _ in made.values()))

    def check_running(self, fed: Fed) -> tuple[bool, frozenset[int]]:
        """The same check for a backward pass that the user calls, as far as a sum of losses allows.

        Also return the tasks of the losses if they read some parts of joined outputs: zeros reach the other heads.
        """
        self._warn_of_data(fed)
        reads, none = frozenset(fed.reads), frozenset[int]()
        known = None if reads in self._joined else self._known(reads, fed)
        if known is not None:
            return known, none
        self._one_tensor.pop(reads, None)
        roots = [made_by(root) for root in running_roots()]
        dependence, own = Dependence(roots), self._own_parameters()
        taps = check_sum(dependence, roots, self._names, own, self.are_own)
        self._warn_of_unknown(dependence)
        if not taps:  # torch does not show what the pass started from
            return fed.only_fork() is not None and fed.may_be_all(), none
        self._warn_of_unlisted([node for root in roots for node, _ in dependence.terms(root).of_none], taps, own)
        tasks = none.union(*map(dependence.tasks, roots))
        if tasks < {tap.task for tap in taps}:
            self._joined.add(reads)
        return self._remember(reads, taps), tasks if reads in self._joined else none

    def _warn_of_data(self, fed: Fed) -> None:
        """Warn once of a gradient of data; that of a representation may be passed on to the backbone by the user."""
        if self._found_data or any(fork.is_leaf for fork in fed.forks):
            return
        inputs = running_inputs()
        if inputs and all(map(_is_data, inputs)):
            self._found_data = True
            warn_user(OF_DATA)

    def warn_of_measured(self) -> None:
        """Warn once of gradients that are computed in addition to those that train."""
        if not self._found_measured:
            self._found_measured = True
            warn_user(MEASURED)

    def _warn_of_unlisted(self, losses: Sequence[Node], taps: Iterable[Node], own: Mapping[int, int]) -> None:
        """Warn once of a layer that may be the head of a task that is not listed."""
        params = unlisted_layers(losses, taps, own) if losses and not self._found_unlisted else []
        if params:
            self._found_unlisted = True
            warn_user(UNLISTED.format(params=names_of(params)))

    def take_shared(self) -> list[Tensor]:
        """Return the parameters behind the heads if the latest graph was searched, otherwise none; and forget them."""
        shared, self._shared = self._shared, []
        return shared

    def _warn_of_unknown(self, dependence: Dependence) -> None:
        """Warn once if it is not certain how losses depend on the heads."""
        if dependence.unknown and not self._warned:
            self._warned = True
            warn_user(UNKNOWN)

    def _known(self, reads: frozenset[Read], fed: Fed) -> bool | None:
        """Return whether all ``reads`` are of one tensor, if known without searching graphs.

        Graphs are searched again occasionally: a loss may change during training, e.g. when terms are added.
        """
        self._num_known[reads] += 1
        if self._num_known[reads] % LOOK_EVERY == 0 or reads not in self._one_tensor or not fed.may_be_all():
            return None
        only = fed.only_fork()
        one_tensor = only is not None and only.tasks >= {task for task, _, _ in reads}
        return one_tensor if one_tensor == self._one_tensor[reads] else None

    def _remember(self, reads: frozenset[Read], taps: Iterable[Node]) -> bool:
        own = self._own_parameters()
        taps = list(taps)
        self._shared = leaves(behind(taps))
        if any(id(param) in own for param in self._shared):
            made_of = [leaves(behind([tap])) for tap in taps]
            for tap, params in zip(taps, made_of, strict=True):
                self._tied.update(id(param) for param in params if own.get(id(param), tap.task) != tap.task)
            for tap, params in zip(taps, made_of, strict=True):
                if params and self.are_own(params, tap.task):
                    self._places.own.add((tap.task, tap.place))  # there is nothing to weight
        self._one_tensor[reads] = len({tap.fork for tap in taps}) <= 1
        return self._one_tensor[reads]

    def are_own(self, params: Iterable[Tensor], task: int) -> bool:
        """Return whether ``params`` belong to ``task`` alone, as those of its embedding."""
        own = self._own_parameters()
        return all(own.get(id(param)) == task and id(param) not in self._tied for param in params)

    def _own_parameters(self) -> dict[int, int]:
        """Return the tasks by the ids of the parameters that belong to them alone."""
        parts = [(part, task) for task, head in enumerate(self._heads) for part in head]
        return {
            id(param): task
            for part, task in parts
            for param in ([part] if isinstance(part, nn.Parameter) else part.parameters())
        }


def _is_data(each: Any) -> bool:
    return isinstance(each, Tensor) and each.is_leaf and not isinstance(each, nn.Parameter)


def _passes(check: Callable[[], None]) -> bool:
    """Return whether ``check`` raises no error about the wiring."""
    try:
        check()
    except RuntimeError:
        return False
    return True
