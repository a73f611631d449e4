"""Refreshing: copies of a model that follow its rotations."""

from __future__ import annotations

import torch
from torch import nn

from rotoopt._capture.capture import Capture
from rotoopt._capture.hooks import hooks_in


def refresh(capture: Capture, model_copy: nn.Module) -> None:
    """Copy the current rotations of ``capture`` into a copy of the model."""
    rotations, places = capture.rotations, capture.places
    if not isinstance(model_copy, nn.Module):
        raise TypeError(f"`model_copy` must be a module, got a {type(model_copy).__name__}.")
    capture.check_current()
    copies = list(hooks_in(model_copy))
    if not copies:
        raise ValueError(
            "`model_copy` must have rotations in front of its heads, got a module without. Either (a) the model was "
            "copied before the optimizer was built, or after remove() or fold(), or (b) its heads are functions that "
            "read optimizer.rotate(z), which is up to date."
        )
    matrices = rotations.matrices
    for _, hook in copies:
        copied = hook.capture.rotations
        if len(copied) != len(rotations) or copied.size not in (None, rotations.size):
            raise ValueError(
                f"`model_copy` must be a copy of the model, with {len(rotations)} rotations of {rotations.size} "
                f"features, got one with {len(copied)} of {copied.size}. Was it copied from another model?"
            )
    with torch.inference_mode(False):  # copies may be evaluated in it, and refreshed elsewhere later
        for _, hook in copies:
            hook.capture.rotations.load_matrices(matrices)
            hook.capture.places.load_state_dict(places.state_dict())
            hook.renew_origin()
