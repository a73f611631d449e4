"""Hooks: what puts a rotation in front of a head that is a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from rotoopt._capture.capture import Capture
from rotoopt._torch.private import forward_pre_hooks

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class HeadHook:
    """Forward pre-hook of one head: replaces the representation by its rotation."""

    def __init__(self, capture: Capture, task: int) -> None:
        self.capture = capture
        self.task = task

    def __call__(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Feed the head."""

        def feed(rep: object) -> Tensor:
            if not isinstance(rep, Tensor):
                raise TypeError(
                    f"The first input of a head must be the representation, a tensor, got {type(rep).__name__}. "
                    "For other inputs give num_tasks=K instead of `heads` and feed the heads the tensors of "
                    "optimizer.rotate(z)."
                )
            return self.capture.feed(rep, self.task, training=head.training)

        return with_representation(feed, args, kwargs)


def with_representation(replace: Callable[[Any], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Return the inputs of a head, with its representation replaced: the first positional or else keyword argument."""
    if args:
        return (replace(args[0]), *args[1:]), kwargs
    if kwargs:
        name = next(iter(kwargs))
        return args, {**kwargs, name: replace(kwargs[name])}
    return args, kwargs


def attach(capture: Capture, head: nn.Module, task: int) -> None:
    """Put rotation ``task`` in front of ``head``."""
    # First of all hooks: wrappers such as FSDP's hand every head a tensor of its own, which is no longer z.
    hook = HeadHook(capture, task)
    capture.handles.append(head.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))


def hook_of(head: nn.Module) -> HeadHook | None:
    """Return the hook of ``head``, None where there is no rotation in front of it."""
    return next((hook for hook in forward_pre_hooks(head) if isinstance(hook, HeadHook)), None)


def hooks_in(model: nn.Module) -> Iterator[HeadHook]:
    """Return the hooks of all heads in ``model``."""
    return (hook for module in model.modules() if (hook := hook_of(module)) is not None)
