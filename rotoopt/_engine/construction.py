"""Checks of the arguments of an optimizer, with their errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from rotoopt._capture.fork import LOSSES_AS_HEADS
from rotoopt._engine.losses import kind
from rotoopt._torch.wrapper import OptimizerWrapper

Head = nn.Module | Sequence[nn.Module | nn.Parameter] | Mapping[str, nn.Module | nn.Parameter]
Heads = Sequence[Head] | Mapping[str, Head] | nn.ModuleList | nn.ModuleDict
Parts = tuple[nn.Module | nn.Parameter, ...]


def check_optimizer(optimizer: object) -> Optimizer:
    """Return ``optimizer`` if it can be wrapped."""
    if isinstance(optimizer, type) or not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer that is already built, got {kind(optimizer)}. "
            "Example: RotoGradOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), heads=[...])."
        )
    if isinstance(optimizer, OptimizerWrapper):
        raise TypeError(
            "`optimizer` must be the optimizer to wrap, got a RotoGradOptimizer, as when a notebook cell runs again. "
            "Wrap its `optimizer.optimizer`, or a new torch optimizer: the rotations of the heads are taken over."
        )
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError("`optimizer` must have at least one parameter, got none. Pass it model.parameters().")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            "`optimizer` must have differentiable=False, got True. Task gradients are combined outside autograd, so "
            "a step cannot be differentiated."
        )
    return optimizer


def check_heads(heads: Heads | None, num_tasks: int | None) -> tuple[list[Parts], list[str]]:
    """Return the parts of every head (none if functional) and the names of the tasks."""
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
            f"`heads` must be a sequence or a mapping of modules, got {kind(heads)}. "
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
            "own; wrap a shared one, as in nn.Sequential(shared), once per task. If one module computes the outputs of "
            f"several tasks, {LOSSES_AS_HEADS}."
        )
    _check_apart(heads_parts, names)
    return heads_parts, names


def _check_apart(heads: Sequence[Parts], names: Sequence[str]) -> None:
    """Check that no module of a head is part of another head."""
    listed = {id(module): name for name, parts in zip(names, heads, strict=True) for module in modules_of(parts)}
    for name, parts in zip(names, heads, strict=True):
        for head in modules_of(parts):
            inside = next(
                (listed[id(each)] for each in head.modules() if each is not head and id(each) in listed), None
            )
            if inside is not None:
                raise ValueError(
                    f"`heads` must be separate, got a module of {inside} that is part of one of {name}. List the "
                    f"modules that belong to each task alone; if {name} reads the output of {inside}, that module is "
                    "part of the backbone."
                )


def _parts(head: object, name: str) -> Parts:
    """Return the modules and parameters that belong to one task alone."""
    if isinstance(head, Mapping | nn.ModuleDict):
        head = list(head.values())
    parts = tuple(head) if isinstance(head, Sequence | nn.ModuleList) and not isinstance(head, str) else (head,)
    for part in parts:
        if not isinstance(part, nn.Module | nn.Parameter):
            raise TypeError(
                f"`heads` must be modules, got {kind(part)} for {name}. For functional heads, pass num_tasks=K "
                "instead, and call them on the tensors of optimizer.rotate(z)."
            )
    if not modules_of(parts):
        raise TypeError(
            f"`heads` must have a module for every task, got none for {name}. A head is called on the representation; "
            "parameters may be listed beside it, as in heads={'task': (head, scale)}."
        )
    return tuple(dict.fromkeys(parts))  # one module may serve all layers of a decoder


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
    """Check the options that do not depend on each other."""
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
            f"{kind(rotation_optimizer)}. "
            "Example: rotation_optimizer=lambda params: torch.optim.Adam(params, lr=1e-4)."
        )
    if init not in ("identity", "haar"):
        raise ValueError(f"`init` must be 'identity' or 'haar', got {init!r}.")


def _is_int(value: object, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least
