"""Checks of what the user hands over, each with the wording of its error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from torch import Tensor, nn
from torch.optim import Optimizer

from rotoopt._capture.fork import Fed, address
from rotoopt._capture.graph import is_handed_on
from rotoopt._torch.private import tree_leaves
from rotoopt._torch.warn import warn_user

Head = nn.Module | Sequence[nn.Module | nn.Parameter]
Heads = Sequence[Head] | Mapping[str, Head] | nn.ModuleList | nn.ModuleDict
Parts = tuple[nn.Module | nn.Parameter, ...]
Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor


def check_optimizer(optimizer: object) -> Optimizer:
    """Return ``optimizer`` if it can be wrapped."""
    if isinstance(optimizer, type) or not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer that is already built, got {_kind(optimizer)}. "
            "Example: RotoGradOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), heads=[...])."
        )
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError("`optimizer` must hold at least one parameter, got none. Pass it model.parameters().")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            "`optimizer` must have differentiable=False, got True. Task gradients are combined outside autograd, so "
            "there is nothing to differentiate through the step."
        )
    return optimizer


def check_heads(heads: Heads | None, num_tasks: int | None) -> tuple[list[Parts], list[str]]:
    """Return the parts of every head (none if functional) and how to call the tasks."""
    if (heads is None) == (num_tasks is None):
        raise ValueError(
            f"Exactly one of `heads` and `num_tasks` must be given, got heads={heads!r} and num_tasks={num_tasks!r}. "
            "Give the modules that consume the representation, or their number if they are functions."
        )
    if num_tasks is not None:
        if not _is_int(num_tasks, at_least=1):
            raise ValueError(f"`num_tasks` must be a positive int, got {num_tasks!r}.")
        return [], [f"task {task}" for task in range(num_tasks)]
    if isinstance(heads, Mapping | nn.ModuleDict):
        given, names = list(heads.values()), list(heads.keys())
    elif isinstance(heads, Sequence | nn.ModuleList):
        given, names = list(heads), [f"heads[{task}]" for task in range(len(heads))]
    else:
        raise TypeError(
            f"`heads` must be a sequence or a mapping of modules, got {_kind(heads)}. "
            "List those that consume the representation, one per task, as in heads=[model.head_a, model.head_b]."
        )
    if not given:
        raise ValueError("`heads` must have at least one module, got none.")
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`heads` must be named by strings, got {names}.")
    heads_parts = [_parts(head, name) for head, name in zip(given, names, strict=True)]
    parts = [part for parts in heads_parts for part in parts]
    if len({id(part) for part in parts}) < len(parts):
        raise ValueError(
            f"`heads` must be different modules, got one of them twice in {names}. Every task needs a head of its "
            "own; wrap a shared one, as in nn.Sequential(shared), once per task."
        )
    _check_apart(heads_parts, names)
    return heads_parts, names


def _check_apart(heads: Sequence[Parts], names: Sequence[str]) -> None:
    """Check that no module of a head is a part of another one."""
    listed = {id(module): name for name, parts in zip(names, heads, strict=True) for module in modules_of(parts)}
    for name, parts in zip(names, heads, strict=True):
        for head in modules_of(parts):
            inside = next(
                (listed[id(each)] for each in head.modules() if each is not head and id(each) in listed), None
            )
            if inside is not None:
                raise ValueError(
                    f"`heads` must lie apart, got a module of {inside} that is part of one of {name}. List what "
                    f"belongs to each task alone; if {name} works on the output of {inside}, that is part of the "
                    "backbone."
                )


def _parts(head: object, name: str) -> Parts:
    """Return the modules and parameters that a task has for itself."""
    if isinstance(head, nn.ModuleDict):
        head = list(head.values())
    parts = tuple(head) if isinstance(head, Sequence | nn.ModuleList) and not isinstance(head, str) else (head,)
    for part in parts:
        if not isinstance(part, nn.Module | nn.Parameter):
            raise TypeError(
                f"`heads` must be modules, got {_kind(part)} for {name}. For functional heads give num_tasks=K "
                "instead and feed them with the tensors of optimizer.rotate(z)."
            )
    if not modules_of(parts):
        raise TypeError(
            f"`heads` must have a module for every task, got none for {name}. A head is called on the representation; "
            "parameters may come beside it, as in heads={'task': (head, scale)}."
        )
    return parts


def modules_of(parts: Parts) -> list[nn.Module]:
    """Return the modules among the parts of a head."""
    return [part for part in parts if isinstance(part, nn.Module)]


def check_rotate(rotate: bool | Sequence[bool], num_tasks: int) -> tuple[bool, ...]:
    """Return one flag per task."""
    flags = tuple(rotate) if isinstance(rotate, Iterable) else (rotate,) * num_tasks
    if len(flags) != num_tasks or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"`rotate` must be a bool or one bool per task, got {rotate!r} for {num_tasks} tasks.")
    return flags


def check_options(
    *,
    rotation_size: int | None,
    burn_in_period: int,
    rotation_lr: float,
    turn_every: int | None,
    rotation_optimizer: object,
    init: str,
) -> None:
    """Check the options that stand for themselves."""
    if rotation_size is not None and not _is_int(rotation_size, at_least=1):
        raise ValueError(f"`rotation_size` must be a positive int or None, got {rotation_size!r}.")
    if not _is_int(burn_in_period, at_least=0):
        raise ValueError(f"`burn_in_period` must be a non-negative number of steps, got {burn_in_period!r}.")
    if not isinstance(rotation_lr, int | float) or not rotation_lr >= 0:
        raise ValueError(f"`rotation_lr` must be a non-negative number, got {rotation_lr!r}.")
    if turn_every is not None and not _is_int(turn_every, at_least=1):
        raise ValueError(f"`turn_every` must be a positive number of steps or None, got {turn_every!r}.")
    if rotation_optimizer is not None and not callable(rotation_optimizer):
        raise TypeError(
            "`rotation_optimizer` must be a callable from parameters to a torch.optim.Optimizer, got "
            f"{_kind(rotation_optimizer)}. "
            "Example: rotation_optimizer=lambda params: torch.optim.Adam(params, lr=1e-4)."
        )
    if init not in ("identity", "haar"):
        raise ValueError(f"`init` must be 'identity' or 'haar', got {init!r}.")


def warn_of_frozen() -> None:
    """Warn that no representation requires grad."""
    warn_user(
        "The representation should require grad, got one that does not. Either (a) the backbone is frozen: the "
        "heads are trained by a plain backward; rotations and weights rest, (b) `heads` holds the whole "
        "model, whose input is rotated then: give the modules that consume the representation, or (c) a head gets what "
        "it reads in an object of a class of its own, or has it stored: hand it over as an input."
    )


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
            f"`losses` must be a sequence with one loss per task, or a mapping from task names, got {_kind(losses)}."
        )
    if isinstance(losses, Mapping):
        unknown = [name for name in losses if name not in names]
        if unknown:
            raise ValueError(f"`losses` must be named after the tasks {list(names)}, got {unknown} as well.")
        by_task = [losses.get(name) for name in names]
    else:
        by_task = list(losses)
    if len(by_task) != len(names):
        raise ValueError(
            f"`losses` must have one entry per task, got {len(by_task)} for {len(names)} tasks. "
            "Put None where a task is absent from this batch."
        )
    present = {task: loss for task, loss in enumerate(by_task) if loss is not None and not is_constant(loss)}
    for task, loss in present.items():
        if not isinstance(loss, Tensor):
            raise TypeError(f"`losses` must be tensors or None, got {_kind(loss)} for {names[task]}.")
        _check_loss(loss, names[task])
    if not present:
        raise ValueError("`losses` must have at least one loss, got only None, or constants.")
    return present


def is_constant(loss: object) -> bool:
    """Whether ``loss`` stands in for that of an absent task, as ``torch.zeros((), requires_grad=True)`` does."""
    constant = isinstance(loss, Tensor) and loss.requires_grad and loss.is_leaf and loss.numel() == 1
    return constant and not isinstance(loss, nn.Parameter)


def check_backbone_loss(loss: object) -> None:
    """Check that ``loss`` is a scalar with a graph, or None."""
    if loss is None:
        return
    if not isinstance(loss, Tensor):
        raise TypeError(f"`backbone_loss` must be a tensor or None, got {_kind(loss)}.")
    _check_loss(loss, "`backbone_loss`")


def _check_loss(loss: Tensor, name: str) -> None:
    if loss.numel() != 1:
        raise ValueError(
            f"Every loss must be a scalar, got shape {tuple(loss.shape)} for {name}. Reduce it, as with loss.mean()."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"Every loss must have a graph, got one without for {name}. Either (a) it was detached or read with "
            ".item(), (b) the forward pass ran under no_grad(), or (c) nothing in it is trainable."
        )


def check_rep(rep: object, fed: Fed, names: Sequence[str]) -> None:
    """Check that ``rep`` is what entered the heads: a tensor, or several, nested in any way."""
    if rep is None:
        return
    tensors = [leaf for leaf in tree_leaves(rep) if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(
            "`rep` must be the shared representation, a tensor or several in lists, tuples and dicts, got "
            f"{_kind(rep)}."
        )
    for tensor in tensors:
        if fed.addresses and address(tensor) not in fed.addresses and not is_handed_on(tensor):
            raise ValueError(
                f"`rep` must be what entered the heads, got a tensor of shape {tuple(tensor.shape)} that did not. What "
                f"did: {fed.described(names)}. Pass that, or leave `rep` out: nothing but this check needs it."
            )


def check_rotatable(rep: object) -> None:
    """Check that ``rep`` is what a rotation can be multiplied by."""
    if not isinstance(rep, Tensor) or not rep.is_floating_point():
        found = f"one of {rep.dtype}" if isinstance(rep, Tensor) else _kind(rep)
        raise TypeError(f"`rotate` must be given the representation, a floating-point tensor, got {found}.")


def _is_int(value: object, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
