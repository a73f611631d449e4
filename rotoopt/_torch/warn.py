"""Warnings that blame the user's line."""

from __future__ import annotations

import inspect
import warnings


def warn_user(message: str) -> None:
    """Warn, and blame the line that called this package, whether or not torch wrapped the call."""
    frame, depth = inspect.currentframe(), 1
    while frame is not None and frame.f_globals["__name__"].partition(".")[0] in ("rotoopt", "torch"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
