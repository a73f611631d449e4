"""Packages that only some of the diagnostics need."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, install: str) -> ModuleType:
    """Import ``module``; if it is missing, raise an error that says how to install it.

    Args:
        module: Its name; a submodule is imported as well.
        install: The command that installs it.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} must be installed for this, got: {error}. Install it: {install}") from error
