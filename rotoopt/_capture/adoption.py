"""Adoption: heads that have rotations already keep them under a new optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rotoopt._capture.capture import Capture
from rotoopt._capture.hooks import HeadHook, hooks_in
from rotoopt._torch.modules import unwrapped

Hooks = list[tuple[int, int, HeadHook]]


def previous_hooks(heads: Sequence[Sequence[nn.Module]], names: Sequence[str]) -> Hooks:
    """Return the hooks that an optimizer before has put on ``heads``, with task and number of the module.

    Raises:
        ValueError: If there is a rotation that differs from I inside of a head, and not in front of it.
    """
    found: Hooks = []
    for task, modules in enumerate(heads):
        for number, module in enumerate(modules):
            for inner, hook in hooks_in(module):
                if inner is not module and inner is not unwrapped(module) and turned([(task, number, hook)]):
                    raise ValueError(
                        "`heads` must be the modules that an optimizer before had, or modules without a rotation in "
                        f"them, got {names[task]}, which has one in front of its {type(inner).__name__}. Call fold() "
                        "on that optimizer first: it makes the rotations part of the heads."
                    )
                found.append((task, number, hook))
    return found


def turned(hooks: Hooks) -> Hooks:
    """Return those of ``hooks`` whose rotation differs from I."""
    return [each for each in hooks if each[2].capture.rotations.is_turned(each[2].task)]


def adopt(hooks: Hooks, capture: Capture, names: Sequence[str]) -> None:
    """Give ``capture`` the rotations of ``hooks``, and remove these.

    Raises:
        ValueError: If they do not fit. Nothing is removed then.
    """
    for task, number, hook in turned(hooks):
        error = capture.whereabouts.load(task, number, hook.capture.whereabouts.saved(hook.task, hook.part))
        if error is not None:
            raise ValueError(
                "`heads` must fit the rotations that they have from an optimizer before, got "
                f"{names[task]}, where {error} Either (a) build this optimizer with options like those of that "
                "one, or (b) call fold() there: it makes the rotations part of the heads."
            )
    for _, _, hook in hooks:
        hook.remove()
