"""Owner: whether the optimizer that uses the captured gradients still exists."""

from __future__ import annotations

import weakref
from typing import Any


class Owner:
    """A reference from a capture of gradients to the optimizer that uses them.

    A copy has no owner until the optimizer is copied with it, in one ``copy.deepcopy`` or pickle. This object has no
    other references, and so is complete in the copy before either of the two, in any order.
    """

    def __init__(self, core: Any) -> None:
        self.become(core)

    def become(self, core: Any) -> None:
        """Make ``core``, the state of an optimizer, the owner."""
        self._core: weakref.ref[Any] | None = weakref.ref(core)

    @property
    def is_gone(self) -> bool:
        """Whether there is none: gradients must then be those that autograd computes."""
        return self._core is None or self._core() is None

    def __getstate__(self) -> dict[str, Any]:
        return {"_core": None}
