"""Adoption: a new optimizer takes over the rotations of a previous one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rotoopt._capture.capture import Capture
from rotoopt._capture.hooks import HeadHook, hook_of, hooks_in
from rotoopt._torch.modules import unwrapped

Hooks = list[tuple[int, int, HeadHook]]


def previous_hooks(heads: Sequence[Sequence[nn.Module]], names: Sequence[str]) -> Hooks:
    """Return the hooks of a previous optimizer on ``heads``, with task and number of the module.

    Raises:
        ValueError: If a rotation other than I is inside of a head, not in front of it.
    """
    found: Hooks = []
    for task, modules in enumerate(heads):
        for number, module in enumerate(modules):
            for inner, hook in hooks_in(module):
                if inner is not module and inner is not unwrapped(module) and turned([(task, number, hook)]):
                    raise ValueError(
                        "`heads` must be the modules of the previous optimizer, or modules without rotations, got "
                        f"{names[task]}, which has one in front of its {type(inner).__name__}. Call fold() on that "
                        "optimizer first, to merge the rotations into the heads."
                    )
                found.append((task, number, hook))
    return found


def turned(hooks: Hooks) -> Hooks:
    """Return those of ``hooks`` whose rotation differs from I."""
    return [each for each in hooks if each[2].capture.rotations.is_turned(each[2].task)]


def adopt(hooks: Hooks, capture: Capture, names: Sequence[str]) -> None:
    """Load the rotations of ``hooks`` into ``capture``, and remove the hooks.

    Weights that were written since, as for a new fold of a cross-validation, are reported: they need other rotations.

    Raises:
        ValueError: If they do not match. In that case nothing is removed.
    """
    for task, number, hook in turned(hooks):
        error = capture.whereabouts.load(task, number, hook.capture.whereabouts.saved(hook.task, hook.part))
        if error is not None:
            raise ValueError(
                "`heads` must match their rotations from the previous optimizer, got "
                f"{names[task]}, where {error} Either (a) build this optimizer with the options of the previous one, "
                "or (b) call fold() on that one, to merge the rotations into the heads."
            )
    for task, number, hook in hooks:
        previous = hook.capture
        if previous.latest_weights.is_noted:
            previous.latest_weights.check(hook.task)
        hook.remove()
        previous.replaced = True
        new = hook_of(capture.whereabouts.heads[task, number])
        if new is not None and not previous.whereabouts.are_loaded():
            new.lost = hook.lost
    for _, _, hook in hooks:
        hook.capture.latest_weights.is_noted = False  # from now on, the new optimizer updates them
