"""Checks of the losses and the representation of a step, with their errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from torch import Tensor, nn

from rotoopt._capture.fed import Fed, address
from rotoopt._capture.fork import LOSSES_AS_HEADS
from rotoopt._capture.graph import is_handed_on
from rotoopt._capture.inputs import is_floating, leaves_of

Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor


def check_losses(losses: Losses, names: Sequence[str]) -> dict[int, Tensor]:
    """Return the losses of the present tasks by task number."""
    if isinstance(losses, Tensor):
        if losses.ndim != 1:
            raise TypeError(
                "`losses` must be a sequence with one loss per task, or a tensor of shape (K,), got a tensor of shape "
                f"{tuple(losses.shape)}. Pass the K losses themselves, as in step([loss_a, loss_b], z), not their sum."
            )
        losses = losses.unbind()
    if not isinstance(losses, Iterable) or isinstance(losses, str | Set):
        raise TypeError(
            f"`losses` must be a sequence with one loss per task, or a mapping from task names, got {kind(losses)}."
        )
    if isinstance(losses, Mapping):
        unknown = [name for name in losses if name not in names]
        if unknown:
            raise ValueError(
                f"`losses` must be named after the tasks {list(names)}, got {unknown} as well. To name tasks, give "
                "`heads` as a mapping: heads={'task': module}."
            )
        by_task = [losses.get(name) for name in names]
    else:
        by_task = list(losses)
    if len(by_task) != len(names):
        hint = "Put None where a task is absent from this batch."
        if len(by_task) > len(names):
            hint = f"Add the losses of one head. To weight them against each other, {LOSSES_AS_HEADS}."
        raise ValueError(f"`losses` must have one entry per task, got {len(by_task)} for {len(names)} tasks. {hint}")
    present = {task: loss for task, loss in enumerate(by_task) if loss is not None and not is_constant(loss)}
    for task, loss in present.items():
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"`losses` must be tensors or None, got {kind(loss)} for {names[task]}. Pass the loss itself, not "
                "loss.item(); None if the task is absent from this batch."
            )
        _check_loss(loss, names[task])
    if not present:
        raise ValueError("`losses` must have at least one loss, got only None, or constants.")
    return present


def is_constant(loss: object) -> bool:
    """Whether ``loss`` is a constant for an absent task, such as ``torch.zeros((), requires_grad=True)``."""
    constant = isinstance(loss, Tensor) and loss.requires_grad and loss.is_leaf and loss.numel() == 1
    return constant and not isinstance(loss, nn.Parameter)


def check_backbone_loss(loss: object) -> None:
    """Check that ``loss`` is a scalar with a graph, or None."""
    if loss is None:
        return
    if not isinstance(loss, Tensor):
        raise TypeError(f"`backbone_loss` must be a tensor or None, got {kind(loss)}.")
    _check_loss(loss, "`backbone_loss`")


def _check_loss(loss: Tensor, name: str) -> None:
    if loss.numel() != 1:
        raise ValueError(
            f"Every loss must be a scalar, got shape {tuple(loss.shape)} for {name}. Reduce it, as with loss.mean()."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"Every loss must have a graph, got one without for {name}. Either (a) it was detached or read with "
            ".item(), (b) the forward pass ran under no_grad(), (c) it has no trainable parameter, or (d) its task "
            "is absent from this batch: pass None instead."
        )


def check_rep(rep: object, fed: Fed, names: Sequence[str]) -> None:
    """Check that ``rep`` entered the heads: a tensor, or several in nested containers."""
    if rep is None:
        return
    tensors = [rep] if isinstance(rep, Tensor) else [leaf for leaf in leaves_of(rep) if is_floating(leaf)]
    if not tensors:
        raise TypeError(
            f"`rep` must be the shared representation, a tensor or several in lists, tuples and dicts, got {kind(rep)}."
        )
    for tensor in tensors:
        if fed.addresses and address(tensor) not in fed.addresses and not is_handed_on(tensor):
            raise ValueError(
                f"`rep` must be what entered the heads, got a tensor of shape {tuple(tensor.shape)} that did not. What "
                f"did: {fed.described(names)}. Pass that, or omit `rep`: it is only used for this check."
            )


def check_rotatable(rep: object) -> None:
    """Check that ``rep`` can be rotated."""
    if not isinstance(rep, Tensor) or not rep.is_floating_point():
        found = f"one of {rep.dtype}" if isinstance(rep, Tensor) else kind(rep)
        raise TypeError(f"`rotate` must be given the representation, a floating-point tensor, got {found}.")


def kind(value: object) -> str:
    """Describe a value that is not a tensor, or not a module."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
