"""Containers that a head writes to: it gets copies with rotated tensors, and the caller must see what it wrote."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from rotoopt._capture.inputs import Inputs, has_items, items_of, remove_item, set_item
from rotoopt._torch.modules import ForwardHook


class Copy(NamedTuple):
    """A dict, list or dataclass that was copied for a head.

    Attributes:
        given: What the caller passed.
        fed: The copy.
        original: The items of ``given`` before the head ran.
        before: Those of ``fed``.
    """

    given: Any
    fed: Any
    original: Any
    before: Any


class Writes(ForwardHook):
    """A forward hook that shows the caller what a head has written to the containers that it got."""

    def __init__(self) -> None:
        self._copies: list[Copy] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_copies": []}  # of a forward pass

    def note(self, given: Inputs, fed: Inputs) -> Inputs:
        """Record which containers in ``given`` were copied in ``fed``, and return ``fed``."""
        found: list[Copy] = []
        for value, new in zip([*given[0], *given[1].values()], [*fed[0], *fed[1].values()], strict=True):
            _collect(value, new, found)
        if found or self._copies:
            self._copies = found
        return fed

    def clear(self) -> None:
        """Record that nothing was copied."""
        if self._copies:  # of a head that has failed
            self._copies = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the output, with the containers of the caller instead of copies that were written to."""
        if not self._copies:
            return output
        copies, self._copies = self._copies, []
        return _write_back(copies, output)


def _collect(given: Any, fed: Any, found: list[Copy]) -> None:
    named = has_items(given)
    if not named and not isinstance(given, (list, tuple)):
        return
    is_copied = not isinstance(given, tuple)
    if is_copied and given is fed:
        return
    before, after = _entries(given), _entries(fed)
    if is_copied:
        found.append(Copy(given, fed, before, after))
    for key in before if named else range(len(before)):
        _collect(before[key], after[key], found)


def _entries(container: Any) -> Any:
    return items_of(container) if has_items(container) else list(container)


def _write_back(copies: list[Copy], output: Any) -> Any:
    written = [_write_items(each) if has_items(each.given) else _write_list(each) for each in copies]
    if not any(written):
        return output
    if type(output) is tuple:
        return tuple([_given(part, copies) for part in output])
    return _given(output, copies)


def _given(value: Any, copies: list[Copy]) -> Any:
    """Return the container of the caller if ``value`` is its copy, otherwise ``value``."""
    if not has_items(value) and not isinstance(value, list):
        return value
    return next((each.given for each in copies if each.fed is value), value)


def _write_items(copy: Copy) -> bool:
    after = items_of(copy.fed)
    removed = [key for key in copy.before if key not in after]
    written = [key for key in after if key not in copy.before or not _same(after[key], copy.before[key])]
    for key in removed:
        remove_item(copy.given, key)
    for key in written:
        set_item(copy.given, key, after[key])
    return bool(removed or written)


def _write_list(copy: Copy) -> bool:
    kept = len(copy.fed) == len(copy.before)
    if kept and all([_same(new, old) for new, old in zip(copy.fed, copy.before, strict=True)]):  # noqa: C419
        return False
    copy.given[:] = [_original(entry, copy) for entry in copy.fed]
    return True


def _original(entry: Any, copy: Copy) -> Any:
    """Return the entry of the caller's list that ``entry`` stands for, or what the head wrote."""
    return next((value for value, fed in zip(copy.original, copy.before, strict=True) if _same(fed, entry)), entry)


def _same(a: Any, b: Any) -> bool:
    """Whether ``a`` is ``b``. torch.compile cannot compare tuples by identity."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all([_same(x, y) for x, y in zip(a, b, strict=True)])  # noqa: C419
    return a is b
