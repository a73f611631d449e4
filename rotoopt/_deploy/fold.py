"""Folding: a model that computes by itself what it computed with its rotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt._capture.capture import Capture
from rotoopt._capture.hooks import Inputs, with_representation
from rotoopt._capture.representation import RotatedDims, rotated
from rotoopt._deploy.first_layers import FirstLayer, UnfoldableError, find_first_layers, wide
from rotoopt._engine.arguments import warn_user
from rotoopt._rotation.rotations import Rotations
from rotoopt._torch.modules import unwrapped


class RotationHook:
    """Forward pre-hook of a head that keeps its rotation: applies the buffer ``rotation`` of the head.

    A buffer is moved, copied, saved and exported with the head. So is a submodule, but an ``nn.Sequential`` would run
    it once more, as its last layer.
    """

    def __init__(self, dims: RotatedDims) -> None:
        self.dims = dims

    def __call__(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Rotate the representation."""
        matrix = head.get_buffer("rotation")
        return with_representation(lambda rep: rotated(rep, matrix, self.dims), args, kwargs)


@torch.inference_mode(False)
@torch.no_grad()
def fold(capture: Capture, heads: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Make every rotation part of its head, and remove the hooks.

    Args:
        capture: Rotates in front of the heads.
        heads: The K heads; none if they are functions.
        names: How to call the tasks.
    """
    _check_foldable(capture, heads)
    rotations, shape = capture.rotations, torch.Size(capture.last_shape or ())
    turned = {task: unwrapped(head) for task, head in enumerate(heads) if _is_turned(rotations, task)}
    matrices = {  # copies, where the model is now: it may have been moved since it ran
        task: rotations[task].to(next(head.parameters(), rotations[task]).device, copy=True)
        for task, head in turned.items()
    }
    plans = {task: _plan(task, heads, shape, capture.dims, matrices[task]) for task in turned}
    reasons = {task: plan for task, plan in plans.items() if isinstance(plan, UnfoldableError)}
    for task, reason in reasons.items():
        if hasattr(turned[task], "rotation"):
            raise RuntimeError(
                f"fold() must be free to add a buffer `rotation` to {names[task]}, got a head with such an attribute: "
                f"rename it. The rotation cannot be folded into the weights of this head: {reason}."
            )
    capture.detach()
    for task, plan in plans.items():
        if isinstance(plan, UnfoldableError):
            turned[task].register_buffer("rotation", matrices[task])
            turned[task].register_forward_pre_hook(RotationHook(capture.dims), prepend=True, with_kwargs=True)
        else:
            for layer in plan:
                layer.weight.copy_(layer.folded(wide(layer.weight), matrices[task]))
    if reasons:
        warn_user(
            "Every head should begin with a linear layer, to fold its rotation into, got some that do not. "
            f"{'; '.join(f'{names[task]}: {reason}' for task, reason in reasons.items())}. They keep their rotations, "
            "as a buffer `rotation` that a forward pre-hook applies. Predictions are the same, but the state dict has "
            "these keys in addition, and does not load into a plain model: save the model as a whole, with torch.save "
            "or torch.export, or begin these heads with nn.Linear or nn.Conv2d when you train again."
        )


def _check_foldable(capture: Capture, heads: Sequence[nn.Module]) -> None:
    """Raise unless there is something to fold, and something to fold it into."""
    if not heads:
        raise RuntimeError(
            "fold() must be used with `heads`, got an optimizer with num_tasks=K. It knows no layers to fold into: "
            "multiply by optimizer.rotations[k] in front of head k."
        )
    if not capture.handles:
        raise RuntimeError(
            "fold() must find the rotations in front of the heads, got heads without. Either (a) fold() was called "
            "before, and the model is ready, or (b) remove() was, and it computes without rotations."
        )
    if any(capture.rotations.rotate) and capture.last_shape is None:
        raise RuntimeError(
            "fold() must know the shape of the representation, got heads that did not run in training mode yet. After "
            "a checkpoint was loaded, too, run one forward pass: model.train(); model(x)."
        )


def _is_turned(rotations: Rotations, task: int) -> bool:
    """Whether R_k differs from I: a task that rests needs no folding."""
    if not rotations.rotate[task]:
        return False
    return not torch.equal(rotations[task], torch.eye(len(rotations[task])).to(rotations[task]))


def _plan(
    task: int, heads: Sequence[nn.Module], shape: torch.Size, dims: RotatedDims, rotation: Tensor
) -> list[FirstLayer] | UnfoldableError:
    """Return the layers to fold into, or why there are none."""
    try:
        layers = find_first_layers(unwrapped(heads[task]), shape, dims, rotation)
    except UnfoldableError as reason:
        return reason
    elsewhere = {id(param) for head in heads if head is not heads[task] for param in head.parameters()}
    if any(id(layer.weight) in elsewhere for layer in layers):
        return UnfoldableError("another head has its first layer, too")
    return layers
