"""Outputs of layers inside a model, by the names of the layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from rotoopt._torch.modules import unwrapped
from rotoopt._torch.private import version

# The outputs of a layer in one forward pass, each with its version counter, None if it has none.
Outputs = list[tuple[Any, int | None]]


class IntermediateLayerGetter:
    r"""Runs a model and returns the outputs of some of its layers.

    Hooks are registered on the layers during a call, and removed even if it fails. The model may be wrapped in
    DistributedDataParallel; names are those without the wrapper. It may be compiled, as a whole or in part: compiled
    code includes the hooks if they were present when it first ran in the same mode (training or evaluation, with or
    without gradients). So run it through the getter from the start; otherwise, the layer counts as one that did not
    run.

    Args:
        model: The model.
        return_layers: Names of the layers, as in ``model.named_modules()``.
        keep_output: Whether to return the output of the model as well.
        clone: Whether to copy the outputs of the layers, for outputs that are changed in place afterwards, e.g. by
            ``nn.ReLU(inplace=True)``. In compiled code, and under ``torch.inference_mode``, they are always copied.

    Raises:
        TypeError: If ``model`` is not a module or ``return_layers`` is a single string.
        ValueError: If the model has no such layer, or ``return_layers`` is empty or contains a name twice.

    Calling it raises a RuntimeError if a layer did not run, ran more than once, or returned a tensor that was changed
    in place afterwards. Outputs that are not tensors are returned as they are.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> maps, output = IntermediateLayerGetter(model, ["2", "0"])(torch.ones(5, 3))
        >>> [(name, tuple(each.shape)) for name, each in maps.items()], tuple(output.shape)
        ([('2', (5, 2)), ('0', (5, 4))], (5, 2))

    Source: ``tllib.regularization.delta.IntermediateLayerGetter``. Differences: the order is that of
    ``return_layers``, as documented there, and not that of execution; names are checked at construction; hooks are
    removed after an error; a layer that did not run or ran twice is an error instead of being missing or counted once;
    and returned outputs have not been changed since.
    """

    def __init__(
        self, model: nn.Module, return_layers: Iterable[str], keep_output: bool = True, *, clone: bool = False
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a module, got a {type(model).__name__}.")
        if isinstance(return_layers, str):
            raise TypeError(f"`return_layers` must be a list of names, got the string {return_layers!r}.")
        self._model = model
        self.return_layers = list(return_layers)
        self.keep_output = keep_output
        self.clone = clone
        if not self.return_layers or len(set(self.return_layers)) < len(self.return_layers):
            raise ValueError(f"`return_layers` must name at least one layer, and each once, got {self.return_layers}.")
        for name in self.return_layers:
            _check_name(unwrapped(model), name)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[OrderedDict[str, Any], Any]:
        """Run the model.

        Args:
            *args: Passed to the model.
            **kwargs: Passed to the model.

        Returns:
            The outputs of the layers by name, in the order of ``return_layers``; and the output of the model, or
            ``None`` without ``keep_output``.

        Raises:
            RuntimeError: If the output of a layer is not available.
        """
        outputs: dict[str, Outputs] = {name: [] for name in self.return_layers}
        handles = []
        try:
            for name, found in outputs.items():
                layer = unwrapped(self._model).get_submodule(name)
                handles.append(layer.register_forward_hook(_Recorder(found, self.clone)))
            output = self._model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        maps = OrderedDict((name, _single(name, found)) for name, found in outputs.items())
        return maps, output if self.keep_output else None


class _Recorder:
    """Forward hook that records the outputs of a layer."""

    def __init__(self, found: Outputs, clone: bool) -> None:
        self.found = found
        self.clone = clone

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            self.found.append((output, None))
        # Compiled code and inference tensors have no version counter.
        elif self.clone or torch.compiler.is_compiling() or output.is_inference():
            self.found.append((output.clone(), None))
        else:
            self.found.append((output, version(output)))


def _single(name: str, found: Outputs) -> Any:
    """Return the only output of a layer, if it was not changed since."""
    if not found:
        raise RuntimeError(
            f"Every layer must run in the forward pass, got {name}, which did not. Likely causes: (a) the model uses "
            "its forward() or its weights instead of calling it, (b) it runs only for some inputs or in one mode of "
            "the model, or (c) the model is compiled, and ran in the same mode without this getter before: run it "
            "through the getter first, or call torch.compiler.reset()."
        )
    if len(found) > 1:
        raise RuntimeError(
            f"Every layer must run once in the forward pass, got {name}, which ran {len(found)} times. Give the model "
            "a separate module, such as nn.Identity(), for every output of interest."
        )
    ((output, changes),) = found
    if changes is not None and version(output) != changes:
        raise RuntimeError(
            f"The output of a layer must not be changed in place, got that of {name}, which was, e.g. by an "
            "nn.ReLU(inplace=True) after it. Either (a) pass clone=True, or (b) name the later layer."
        )
    return output


def _check_name(model: nn.Module, name: str) -> None:
    try:
        model.get_submodule(name)
    except AttributeError as error:
        near = get_close_matches(name, [known for known, _ in model.named_modules()])
        hint = f"Did you mean {' or '.join(near)}?" if near else "See model.named_modules()."
        raise ValueError(f"`return_layers` must name layers of the model, got {name!r}. {hint}") from error
