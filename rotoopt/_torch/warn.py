"""Warnings that refer to the user's line."""

from __future__ import annotations

import inspect
import warnings


def warn_user(message: str) -> None:
    """Warn with the location of the call of this package, even if torch wrapped the call."""
    frame, depth = inspect.currentframe(), 1
    while frame is not None and frame.f_globals["__name__"].partition(".")[0] in ("rotoopt", "torch"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
