"""Store: results in a JSON file, one per line. An interruption leaves either the old or the new file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def load(path: Path) -> list[Entry]:
    """Return the entries of a file, none if there is no file.

    Raises:
        ValueError: If the file has other contents; it is not changed.
    """
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:  # neither JSON nor text
        raise ValueError(_message(path, str(error))) from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(_message(path, type(entries).__name__))
    return entries


def save(path: Path, entries: Iterable[Entry]) -> None:
    """Write all entries, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n").encode())
    os.replace(partial, path)


def _message(path: Path, found: str) -> str:
    return f"`path` must be a file that a comparison has written, or none yet, got {path}: {found}. Give another path."
