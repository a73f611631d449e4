"""Folding: a model without hooks that computes the same as with its rotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt._capture.capture import Capture
from rotoopt._capture.inputs import Inputs, is_floating, paths_and_leaves, rebuilt
from rotoopt._capture.paths import Arguments, Path, as_in_training
from rotoopt._capture.places import Place
from rotoopt._capture.representation import RotatedDims, rotated
from rotoopt._capture.writes import Writes
from rotoopt._deploy.first_layers import FirstLayer, UnfoldableError, find_first_layers, wide
from rotoopt._torch.modules import unwrapped
from rotoopt._torch.warn import warn_user


class RotationHook:
    """Forward pre-hook of a head that keeps its rotation: applies the buffer ``rotation`` of the head.

    A buffer is moved, copied, saved and exported with the head. A submodule would be, too, but ``nn.Sequential`` would
    run it as its last layer.

    Args:
        dims: The rotated dimensions.
        arguments: Names of the arguments of the head.
        noted: Positions of tensors among them, and whether these are rotated.
        covers_all: Whether all features are rotated.
    """

    def __init__(
        self, dims: RotatedDims, arguments: Arguments, noted: Mapping[Path, bool | None], *, covers_all: bool
    ) -> None:
        self.dims = dims
        self.arguments = arguments
        self.noted = noted
        self.covers_all = covers_all
        self.writes = Writes()

    def __call__(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Rotate the inputs of the head."""
        matrix = head.get_buffer("rotation")
        pairs = paths_and_leaves((args, kwargs), self.arguments)

        def fits(leaf: Tensor) -> bool:
            return self.dims.fit(leaf.shape, len(matrix), all_of_them=self.covers_all)

        paths = as_in_training(pairs, self.noted, fits)
        leaves = [
            rotated(leaf, matrix, self.dims) if is_floating(leaf) and self.noted.get(path) else leaf
            for path, (_, leaf) in zip(paths, pairs, strict=True)
        ]
        return self.writes.note((args, kwargs), rebuilt((args, kwargs), leaves))


@dataclass(frozen=True)
class Rotated:
    """A module with a rotation other than I in front of it.

    Attributes:
        name: Its name in messages.
        module: The module itself, without wrappers of torch.
        matrix: A copy of R_k, on the device of the module. Shape ``(m, m)``.
        noted: Positions of tensors among the inputs, and whether these are rotated.
        shape: The shape of z, if it is the only input; None otherwise.
    """

    name: str
    module: nn.Module
    matrix: Tensor
    noted: Mapping[Path, bool | None]
    shape: torch.Size | None


@torch.inference_mode(False)
@torch.no_grad()
def fold(capture: Capture, heads: Sequence[Sequence[nn.Module]], names: Sequence[str]) -> None:
    """Fold every rotation into its head, and remove the hooks.

    Args:
        capture: The hooks in front of the heads.
        heads: The modules of the K heads; empty if they are functions.
        names: Names of the tasks.
    """
    _check_foldable(capture, heads)
    everything = [each for task, head in enumerate(heads) for each in _rotated(capture, task, head, names[task])]
    plans = [(each, _plan(each, heads, capture.dims)) for each in everything]
    reasons = [(each.name, plan) for each, plan in plans if isinstance(plan, UnfoldableError)]
    for each, plan in plans:
        if isinstance(plan, UnfoldableError) and hasattr(each.module, "rotation"):
            raise RuntimeError(
                f"fold() must be free to add a buffer `rotation` to {each.name}, got a head with such an attribute: "
                f"rename it. The rotation cannot be folded into the weights of this head: {plan}."
            )
    # Everything that can fail runs before anything that changes the predictions.
    folded = [
        (layer.weight, layer.folded(wide(layer.weight), each.matrix))
        for each, plan in plans
        if not isinstance(plan, UnfoldableError)
        for layer in plan
    ]
    with ExitStack() as undo:
        for each, plan in plans:
            if isinstance(plan, UnfoldableError):
                _add_buffer(each, plan)
                undo.callback(delattr, each.module, "rotation")
        undo.pop_all()
    capture.detach()
    for each, plan in plans:
        if isinstance(plan, UnfoldableError):
            arguments = Arguments.of(each.module)
            hook = RotationHook(capture.dims, arguments, each.noted, covers_all=capture.rotations.covers_all)
            each.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            each.module.register_forward_hook(hook.writes, prepend=True)
    for weight, rotated_weight in folded:
        weight.copy_(rotated_weight)
    changing = [names[task] for task in sorted(capture.in_place.tasks) if not capture.rotations.is_turned(task)]
    if changing:
        warn_user(
            "A head should not change its input in place before fold(), got "
            f"{', '.join(changing)}. So far, it was given a copy. Now it changes the tensor itself, as in a plain "
            "model: if another head or layer reads that tensor afterwards, its predictions change. Begin the head "
            "with nn.ReLU(inplace=False) then, or the like."
        )
    if reasons:
        warn_user(
            "Every head should begin with a linear layer of its own, to fold its rotation into, got some that do not. "
            f"{'; '.join(f'{name}: {reason}' for name, reason in reasons)}. They keep their rotations, "
            "as a buffer `rotation` that a forward pre-hook applies. Predictions are the same, but the state dict has "
            "these keys in addition, and does not load into a plain model: save the model as a whole, with "
            "torch.export, or with torch.save, which needs rotoopt to load it, or begin these heads with nn.Linear or "
            "nn.Conv2d when you train again."
        )


def _add_buffer(head: Rotated, reason: UnfoldableError) -> None:
    """Add the rotation to a head that keeps it."""
    try:
        head.module.register_buffer("rotation", head.matrix)
    except Exception as error:  # AttributeError of a traced module; others may raise anything
        raise RuntimeError(
            f"fold() must be free to add a buffer `rotation` to {head.name}, got a {type(head.module).__name__} that "
            f"takes none ({error}). Train the module as it was before torch.jit.trace, and trace what was folded. The "
            f"rotation cannot be folded into the weights of this head: {reason}."
        ) from error


def _check_foldable(capture: Capture, heads: Sequence[Sequence[nn.Module]]) -> None:
    """Raise unless there are rotations to fold, and modules to fold them into."""
    if not heads:
        raise RuntimeError(
            "fold() must be used with `heads`, got an optimizer with num_tasks=K. There are no layers to fold into: "
            "multiply by optimizer.rotations[k] in front of head k."
        )
    capture.check_current()
    if not capture.handles:
        raise RuntimeError(
            "fold() must find the rotations in front of the heads, got heads without. Either (a) fold() was called "
            "before, and the model is ready, or (b) remove() was called, and the model runs without rotations."
        )
    tasks = range(len(heads))
    has_run = any(capture.places.noted)
    if any(capture.rotations.rotate) and not (has_run and all(_is_known(capture, task) for task in tasks)):
        raise RuntimeError(
            "fold() must know the shape of the representation, got heads that did not run in training mode yet. Run "
            "one forward pass, also after loading a checkpoint: model.train(); model(x)."
        )


def _is_known(capture: Capture, task: int) -> bool:
    """Whether R_k = I, or its place and the shape of z are known."""
    noted = capture.places.noted[task]
    alone = [place for part in {part for part, _ in noted} if (place := _only_place(capture, task, part)) is not None]
    has_run = bool(noted) and all((task, place) in capture.shapes for place in alone)
    return has_run or not capture.rotations.is_turned(task)


def _only_place(capture: Capture, task: int, part: int) -> Place | None:
    """Return where z enters a module that is called as ``head(z)``; None if it has other inputs, or is not rotated."""
    noted = {place: rotates for place, rotates in capture.places.noted[task].items() if place[0] == part}
    (place,) = noted if len(noted) == 1 else (None,)
    return place if place is not None and noted[place] and len(place[1]) == 1 else None


def _rotated(capture: Capture, task: int, head: Sequence[nn.Module], name: str) -> list[Rotated]:
    """Return the modules of a task whose inputs are rotated; none where R = I."""
    if not capture.rotations.is_turned(task):
        return []
    rotation, found = capture.rotations[task], []
    for number, module in enumerate(map(unwrapped, head)):
        noted = {path: rotates for (part, path), rotates in capture.places.noted[task].items() if part == number}
        if any(noted.values()):
            # A copy on the current device of the model, which may have been moved since it ran.
            matrix = rotation.to(next(module.parameters(), rotation).device, copy=True)
            place = _only_place(capture, task, number)
            shape = None if place is None else capture.shapes[task, place]
            found.append(Rotated(name if len(head) == 1 else f"{name}[{number}]", module, matrix, noted, shape))
    return found


def _plan(head: Rotated, heads: Sequence[Sequence[nn.Module]], dims: RotatedDims) -> list[FirstLayer] | UnfoldableError:
    """Return the layers to fold into, or the reason why there are none."""
    if head.shape is None:
        return UnfoldableError("it needs more inputs than z")
    try:
        layers = find_first_layers(head.module, head.shape, dims, head.matrix)
    except UnfoldableError as reason:
        return reason
    others = [other for modules in heads for other in map(unwrapped, modules) if other is not head.module]
    elsewhere = {id(param) for other in others for param in other.parameters()}
    if any(id(layer.weight) in elsewhere for layer in layers):
        return UnfoldableError("another head shares its first layer")
    return layers
