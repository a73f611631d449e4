"""The entry for ``torch.distributed.checkpoint``, which only saves moments and groups of an optimizer."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch


class RotoGradState:
    """State of the method as a ``Stateful``, next to the state dict of the optimizer in a distributed checkpoint.

    It is one opaque value, equal on all processes and saved as one object, so that state that does not exist yet in a
    new optimizer can be loaded.

    Args:
        save: Returns the state as plain containers.
        load: Loads it.
    """

    def __init__(self, save: Callable[[], dict[str, Any]], load: Callable[[dict[str, Any]], None]) -> None:
        self._save = save
        self._load = load

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        buffer = io.BytesIO()
        torch.save(self._save(), buffer)
        return {"serialized": buffer.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: If it was saved with another number of tasks, another size of the rotations, or other options.
        """
        buffer = io.BytesIO(state_dict["serialized"])
        self._load(torch.load(buffer, map_location="cpu", weights_only=True))
