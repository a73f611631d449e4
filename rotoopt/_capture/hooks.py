"""Hooks of a head module: they rotate its inputs, and keep the rotation with its weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rotoopt._capture.capture import Capture
from rotoopt._capture.first_layer import FirstLayer
from rotoopt._capture.first_weight import FirstWeight
from rotoopt._capture.inputs import Inputs, is_floating
from rotoopt._capture.paths import Arguments
from rotoopt._capture.whereabouts import ENTRY, STALE, Origin, checksums, is_here
from rotoopt._capture.writes import Writes
from rotoopt._torch.modules import unwrapped
from rotoopt._torch.private import forward_pre_hooks, not_compiled
from rotoopt._torch.warn import warn_user


class HeadHook:
    """The hooks of one module of a head.

    Args:
        capture: Rotates the inputs.
        task: k.
        part: Number of the module among those of task k.
        arguments: Names of its arguments.

    Attributes:
        handles: Handles that remove the hooks.
        lost: The warning if weights were loaded without the rotation that they need.
        origin: The original, if this is a copy that is not trained itself; otherwise None.
        writes: What the head writes to its inputs.
        first_weight: The weight that may be rotated instead of the input; None if there is none.
    """

    def __init__(self, capture: Capture, task: int, part: int, arguments: Arguments) -> None:
        self.capture = capture
        self.task = task
        self.part = part
        self.arguments = arguments
        self.handles: list[RemovableHandle] = []
        self.lost: str | None = None
        self.origin: Origin | None = None
        self._awaits_gradients = False
        self.writes = Writes()
        self.first_weight: FirstWeight | None = None

    def __call__(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Inputs:
        """Rotate the inputs of the head."""
        if kwargs is None:
            raise RuntimeError(
                f"A head must be the module that was given in `heads`, got a {type(head).__name__} with its hooks, as "
                "created by quantize_dynamic() and prepare_qat(). Call optimizer.fold() first, to merge the rotations "
                "into the weights."
            )
        if self.lost is not None or self.origin is not None:
            self._warn(head)
        evaluates = not (head.training and torch.is_grad_enabled())
        if evaluates and self.capture.latest_weights.is_noted and not torch.compiler.is_compiling():
            self.capture.latest_weights.check(self.task)
        if len(args) == 1 and not kwargs and is_floating(args[0]):
            self.writes.clear()
            place = self.part, self.arguments.first
            first = None if torch.compiler.is_compiling() else self.first_weight
            return (self.capture.feed(args[0], self.task, place, first, training=head.training, own=True),), kwargs
        fed = self.capture.feed_all(args, kwargs, self.task, self.part, self.arguments, training=head.training)
        return self.writes.note((args, kwargs), fed)

    @not_compiled
    def _warn(self, head: nn.Module) -> None:
        if self.lost is not None and not self.capture.whereabouts.are_loaded():
            warn_user(self.lost)
        self.lost = None
        if self.capture.owner is not None and not self.capture.owner.is_gone:
            self.origin = None  # copied with its optimizer
        if self.origin is None:
            return
        trains = head.training and torch.is_grad_enabled()
        if torch.is_grad_enabled() and not self._awaits_gradients:
            self._await_gradients()
        if self.origin.has_moved_on(self._weights, waits=not trains):
            self.origin.renew(self._weights)
            warn_user(STALE)

    def _await_gradients(self) -> None:
        """Detect gradients of the weights of this copy: it is then trained itself, with its own rotations."""
        handles: list[RemovableHandle] = []

        def trained(_: Tensor) -> None:
            self.origin = None
            for handle in handles:
                handle.remove()

        weights = [weight for weight in self._weights if weight.requires_grad and weight.is_leaf]
        for weight in weights:
            handle = weight.register_post_accumulate_grad_hook(trained)  # type: ignore[no-untyped-call]
            handles.append(handle)
        self._awaits_gradients = bool(weights)

    @property
    def _weights(self) -> Sequence[Tensor]:
        return self.capture.whereabouts.weights(self.task, self.part)

    # ------------------------------------------------------------------ where the weights go

    def save(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        """Add the rotation to the metadata of a state dict, ``state_dict._metadata``."""
        numbers = checksums(state_dict, prefix)
        if numbers is not None:  # otherwise they differ between processes, and rotations must not
            metadata[ENTRY] = {**self.capture.whereabouts.saved(self.task, self.part), "checksums": numbers}

    def load(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Load the rotation that belongs to the weights in ``state_dict``."""
        if _changes_nothing(module, state_dict, prefix):
            return
        self.capture.latest_weights.forget()
        saved, numbers = metadata.get(ENTRY), checksums(state_dict, prefix)
        if saved is None or numbers is None or numbers[0] not in saved["checksums"]:
            would_know = numbers is not None and "version" in metadata
            self.lost = self.capture.whereabouts.what_is_lost(self.task, saved, would_know=would_know)
            return
        error = self.capture.whereabouts.load(self.task, self.part, saved)
        if error is not None:
            errors.append(f"{prefix}: {error}")
        self.lost = None
        if self.origin is not None:
            names = [prefix + name for name, _ in module.named_parameters()]
            is_whole = names and all(name in state_dict for name in names)
            self.origin.renew([state_dict[name] for name in names] if is_whole else None)

    def load_part(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Record that weights of a part of the head are loaded without its rotation, which only the whole head has."""
        if not prefix and not _changes_nothing(module, state_dict):
            self.capture.latest_weights.forget()
            self.lost = self.capture.whereabouts.what_is_lost(self.task, None, would_know=True)

    def renew_origin(self) -> None:
        """Treat the rotation as that of the current weights."""
        if self.origin is not None:
            self.origin.renew(self._weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadHook:
        copied = HeadHook.__new__(HeadHook)
        memo[id(self)] = copied  # first, since copying the capture leads here again
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied.origin = Origin(self.capture.rotations, self._weights)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "origin": None, "_awaits_gradients": False}  # another process has no original

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def _changes_nothing(module: nn.Module, state_dict: dict[str, Any], prefix: str = "") -> bool:
    """Whether there is nothing to load, or ``module.state_dict()`` itself, which shares the memory of the weights."""
    own = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
    given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    values = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    # A head without parameters is loaded with the rest of its model.
    return bool(own) and all(_is_same(value, own.get(name)) for name, value in values.items())


def _is_same(value: Tensor, own: Tensor | None) -> bool:
    """Whether ``value`` shares the memory of ``own``, so that loading it changes nothing."""
    if own is None or not (is_here(value) and is_here(own)):
        return False
    return value.data_ptr() == own.data_ptr() and value.shape == own.shape


def attach(capture: Capture, head: nn.Module, task: int, part: int, name: str) -> None:
    """Put rotation ``task`` in front of ``head``, which is module number ``part`` of the task ``name``.

    Raises:
        TypeError: If ``head`` does not accept hooks.
    """
    inner = unwrapped(head)
    hook = HeadHook(capture, task, part, Arguments.of(inner))
    capture.whereabouts.heads[task, part] = head
    try:
        # Before all other hooks: wrappers such as FSDP's pass another tensor than z to every head.
        hook.handles.append(head.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        hook.handles.append(head.register_forward_hook(hook.writes, prepend=True))
        hook.first_weight = first = FirstWeight.of(head, (hook, hook.writes))
        if first is not None:  # not prepended: torch.compile before 2.9 mistakes two prepended hooks for each other
            hook.handles.append(first.layer.register_forward_hook(first))
        # Partial, because torch sets an attribute of the hook.
        hook.handles += [
            inner.register_state_dict_post_hook(partial(hook.save)),  # type: ignore[no-untyped-call]
            inner.register_load_state_dict_pre_hook(partial(hook.load)),  # type: ignore[no-untyped-call]
        ]
        for layer in inner.modules():
            if layer is not inner and not isinstance(layer, torch.jit.ScriptModule):
                loaded = layer.register_load_state_dict_pre_hook(partial(hook.load_part))  # type: ignore[no-untyped-call]
                hook.handles.append(loaded)
    except RuntimeError as error:
        raise TypeError(
            f"`heads` must be modules that accept hooks, got a {type(head).__name__} for {name}: {error}. Pass the "
            "module as it was before torch.jit.script, and script it after fold()."
        ) from error
    finally:
        capture.handles += hook.handles
    capture.places.first_layers[task, part] = FirstLayer.of(inner)


def hook_of(head: nn.Module) -> HeadHook | None:
    """Return the hook of ``head``, None if there is no rotation in front of it."""
    return next((hook for hook in forward_pre_hooks(head) if isinstance(hook, HeadHook)), None)


def hooks_in(model: nn.Module) -> Iterator[tuple[nn.Module, HeadHook]]:
    """Return all heads in ``model``, and their hooks."""
    return ((module, hook) for module in model.modules() if (hook := hook_of(module)) is not None)
