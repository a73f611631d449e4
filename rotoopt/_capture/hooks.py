"""Hooks: what puts a rotation in front of a head that is a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from rotoopt._capture.capture import Capture, Inputs
from rotoopt._torch.private import forward_pre_hooks


class HeadHook:
    """Forward pre-hook of a module of a head: rotates what enters it."""

    def __init__(self, capture: Capture, task: int, part: int) -> None:
        self.capture = capture
        self.task = task
        self.part = part

    def __call__(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Feed the head."""
        return self.capture.feed_all(args, kwargs, self.task, self.part, training=head.training)


def attach(capture: Capture, head: nn.Module, task: int, part: int) -> None:
    """Put rotation ``task`` in front of ``head``, which is module number ``part`` of the task."""
    # First of all hooks: wrappers such as FSDP's hand every head a tensor of its own, which is no longer z.
    hook = HeadHook(capture, task, part)
    capture.handles.append(head.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))


def hook_of(head: nn.Module) -> HeadHook | None:
    """Return the hook of ``head``, None where there is no rotation in front of it."""
    return next((hook for hook in forward_pre_hooks(head) if isinstance(hook, HeadHook)), None)


def hooks_in(model: nn.Module) -> Iterator[HeadHook]:
    """Return the hooks of all heads in ``model``."""
    return (hook for module in model.modules() if (hook := hook_of(module)) is not None)
