"""Counts operations: on a GPU each is a kernel launch, whatever its size."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Views, uninitialized allocations and profiler records launch nothing.
FREE = re.compile(
    "view|reshape|_unsafe_view|expand|t|transpose|permute|movedim|unsqueeze|squeeze|select|slice|detach|alias|as_strided|"
    "empty|empty_like|empty_strided|new_empty|new_empty_strided|split|split_with_sizes|unbind|diagonal|flatten|unflatten|"
    "_record_function_.*"
)


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        is_empty = isinstance(result, Tensor) and not result.numel()  # nothing to compute
        self.found[name] += FREE.fullmatch(name) is None and not is_empty
        return result
