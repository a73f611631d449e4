"""The results of the quality study: one record per training run, kept in a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One training run: what it is, the metrics it ended with, and what it took."""

    problem: str
    method: str
    seed: int
    metrics: list[float]
    seconds: float


def load(path: Path) -> list[Run]:
    """Read the runs that are there already."""
    return [Run(**entry) for entry in json.loads(path.read_text())] if path.exists() else []


def save(runs: Sequence[Run], path: Path) -> None:
    """Write all runs."""
    write([asdict(run) for run in runs], path)


def write(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one entry per line; an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
    os.replace(partial, path)
