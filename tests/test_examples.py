"""Every example runs, shortened, in a separate process, and prints the table that the examples page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "examples.md"  # shows their outputs
NUMBER = re.compile(r"\d+(\.\d+)?")

# Arguments that shorten it, a line of its output, and a file that it saves.
EXAMPLES: dict[str, tuple[list[str], str, str | None]] = {
    "toy.py": (["--seeds", "1", "--steps", "20"], "RotoGrad", "toy.png"),
    "dense_prediction.py": (["--epochs", "1"], "RotoGrad", None),
    "tokens.py": (["--epochs", "1"], "RotoGrad", None),
    "fine_tuning.py": (["--seeds", "1", "--steps", "2"], "Bi-Tuning", "fine_tuning.png"),
    "with_lightning.py": (["--epochs", "2"], "RotoGrad", None),
    "distributed.py": (["--steps", "3"], "losses after training", None),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path) -> None:
    arguments, line, picture = EXAMPLES[name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert line in finished.stdout
    assert NUMBER.sub("#", finished.stdout.splitlines()[0]) in NUMBER.sub("#", PAGE.read_text(encoding="utf-8"))
    assert picture is None or (tmp_path / picture).stat().st_size > 10_000


def test_examples_are_short_and_say_what_to_expect() -> None:
    for name in EXAMPLES:
        text = (ROOT / "examples" / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 170, name
        header = text.split('"""')[1]
        assert f"examples/{name}" in header
        assert "Takes" in header
