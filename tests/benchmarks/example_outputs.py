"""Run the examples, and write their output into docs/examples.md and their pictures into docs/images.

    python -m tests.benchmarks.example_outputs              # all of them
    python -m tests.benchmarks.example_outputs toy tokens   # some of them

A ``text`` block right behind a ``console`` block gets the output of that command. Takes 8 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "examples.md"
OUTPUT = re.compile(r"```console\n(?P<command>[^\n]+)\n```\n\n```text\n.*?```", re.DOTALL)
START = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def output_of(command: str) -> str:
    """Run a command of the page in an empty folder, keep its pictures, and return what it prints."""
    program, *arguments = shlex.split(command)
    arguments = [str(ROOT / each) if each.startswith("examples/") else each for each in arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        run = [*START[program], *arguments]
        finished = subprocess.run(run, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, ROOT / "docs" / "images")
    lines = [line.rstrip() for line in finished.stdout.splitlines() if "100%" not in line]  # a progress bar
    return "\n".join(lines).strip("\n")


def main() -> None:
    """Run the selected examples, and update the page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help="examples, without .py (all)")
    names = parser.parse_args().names

    def rerun(block: re.Match[str]) -> str:
        command = block["command"]
        if names and not any(f"examples/{name}.py" in command for name in names):
            return block[0]
        start = time.perf_counter()
        output = output_of(command)
        print(f"{command}: {time.perf_counter() - start:.0f} s", flush=True)
        return f"```console\n{command}\n```\n\n```text\n{output}\n```"

    PAGE.write_text(OUTPUT.sub(rerun, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
