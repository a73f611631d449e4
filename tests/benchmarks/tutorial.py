"""Run a page, and update the outputs in it and its pictures.

    python -m tests.benchmarks.tutorial docs/tutorial.md

A ``text`` block right behind a ``python`` block is replaced by the output of that block. Pictures that the page shows
are saved in ``docs/images``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path

import matplotlib as mpl
import torch

from tests.test_docs import run_page

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main() -> None:
    """Run a page, and update its outputs and pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page.resolve()
    mpl.use("Agg")
    torch.set_num_threads(1)
    lines = page.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        printed = run_page(page)
        for name in re.findall(r"\]\([./]*images/([\w.]+)\)", "\n".join(lines)):
            if Path(name).exists():
                shutil.copy(name, IMAGES)
    for block, output in reversed(printed):
        lines[block.first - 1 : block.last] = output.rstrip("\n").splitlines()
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
