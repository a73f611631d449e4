"""Adoption: heads that have rotations already keep them under a new optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rotoopt._capture.capture import Capture
from rotoopt._capture.hooks import HeadHook, hooks_in

Hooks = list[tuple[int, int, HeadHook]]


def previous_hooks(heads: Sequence[Sequence[nn.Module]]) -> Hooks:
    """Return the hooks that an optimizer before has put on ``heads``, with task and number of the module."""
    return [
        (task, number, hook)
        for task, modules in enumerate(heads)
        for number, module in enumerate(modules)
        for _, hook in hooks_in(module)
    ]


def turned(hooks: Hooks) -> Hooks:
    """Return those of ``hooks`` whose rotation differs from I."""
    return [each for each in hooks if each[2].capture.rotations.is_turned(each[2].task)]


def adopt(hooks: Hooks, capture: Capture, names: Sequence[str]) -> None:
    """Give ``capture`` the rotations of ``hooks``, and remove these.

    Raises:
        ValueError: If they do not fit. Nothing is removed then.
    """
    for task, number, hook in turned(hooks):
        error = capture.load_saved(task, number, hook.capture.saved(hook.task, hook.part))
        if error is not None:
            raise ValueError(
                "`heads` must fit the rotations that they have from an optimizer before, got "
                f"{names[task]}, where {error} Either (a) build this optimizer with options like those of that "
                "one, or (b) call fold() there: it makes the rotations part of the heads."
            )
    for _, _, hook in hooks:
        hook.remove()
