"""The tree: imports follow the data flow, private names of torch are in one file, a step runs the documented files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from rotoopt import RotoGradOptimizer
from rotoopt._capture.wiring import LOOK_EVERY
from rotoopt.optimizer import TURN_EVERY

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rotoopt"
GUIDE = ROOT / "docs" / "contributing.md"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom: each may import itself and those above it in this list.
LAYERS = (
    "_torch",
    "_rotation",
    "weighting",
    "_capture",
    "_engine",
    "_deploy",
    "optimizer",
    "rotograd",
    "diagnostics",
    "comparison",
    "testing",
    "regularization",
)


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Yield the layers that a file imports, except for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and id(node) not in for_types
            and (node.module or "").startswith("rotoopt.")
        ):
            yield (node.module or "").split(".")[1]


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE], ids=lambda p: str(p.name))
def test_imports_point_down_the_data_flow(path: Path) -> None:
    own = LAYERS.index(layer(path))
    assert {name for name in imported(path) if LAYERS.index(name) > own} == set()


def test_every_part_of_the_package_is_a_layer() -> None:
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    assert parts - {"__pycache__", "__init__", "py.typed"} == set(LAYERS)


def private_names(path: Path) -> tuple[set[str], set[str]]:
    """Return the private names that a file defines, and those that it uses of others."""
    made, asked = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            made.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            made.add(node.attr)
        elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            asked.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "rotoopt":
            asked |= {name.name for name in node.names if re.match("_[^_]", name.name)}
            asked |= {part for part in (node.module or "").split(".") if re.match("_[^_]", part)}
    return made, asked


# Methods that torch asks modules to override, called on `super()`.
OVERRIDDEN = {"_apply", "_load_from_state_dict", "_save_to_state_dict"}
# Documented in spite of its name: os._exit.
PUBLIC = {"_exit"}


def test_private_names_of_torch_are_in_one_file() -> None:
    found = {path: private_names(path) for path in FILES}
    known = set().union(OVERRIDDEN, PUBLIC, *(made for made, _ in found.values()))
    foreign = {path.name: asked - known for path, (_, asked) in found.items() if asked - known}
    assert set(foreign) == {"private.py"}


def test_import_is_light() -> None:
    """It only adds itself and geotorch to torch: no torch._dynamo, whose import takes as long as that of torch."""
    code = "import sys, torch; before = set(sys.modules); import rotoopt; print(*(set(sys.modules) - before))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    modules = printed.split()
    assert "rotoopt.optimizer" in modules
    assert {name.split(".")[0] for name in modules} == {"rotoopt", "geotorch"}
    assert not any(name.startswith(("rotoopt.testing", "rotoopt.diagnostics", "rotoopt.reg")) for name in modules)


def files_of_a_step(steps: int) -> list[str]:
    """Return the files of the package that the last of some steps executes, in order."""
    backbone, heads = nn.Linear(3, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
    bare = torch.optim.SGD([*backbone.parameters(), *heads.parameters()], lr=0.1)
    optimizer = RotoGradOptimizer(bare, heads)
    seen: list[str] = []

    def note(frame: object, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)  # type: ignore[attr-defined]
        if event == "call" and PACKAGE in path.parents:
            seen.append(str(path.relative_to(PACKAGE)))

    for step in range(steps):
        z = backbone(torch.randn(5, 3))
        losses = [head(z).square().mean() for head in heads]
        sys.setprofile(note if step == steps - 1 else None)
        try:
            optimizer.step(losses, z)
        finally:
            sys.setprofile(None)
    return list(dict.fromkeys(seen))


def drawn(heading: str) -> list[str]:
    """Return the files in the table below a heading of the contributing guide."""
    _, _, section = GUIDE.read_text(encoding="utf-8").partition(f"\n### {heading}\n")
    return re.findall(r"^\| (?:\d+ \| )?`([\w/]+\.py)`", section.split("\n#")[0], flags=re.MULTILINE)


@pytest.mark.parametrize("steps", [TURN_EVERY, TURN_EVERY + 1], ids=["rotations rest", "rotations turn"])
def test_step_executes_the_documented_files_in_their_order(steps: int) -> None:
    way, aside = drawn("What happens in a step"), drawn("Other files used in a step")
    assert len(way) == 8
    seen = files_of_a_step(steps)
    assert [path for path in seen if path in way] == way[: len(way) - (steps == TURN_EVERY)]
    assert set(seen) - set(way) <= set(aside)
    if steps > TURN_EVERY:
        assert set(aside) <= {*seen, *files_of_a_step(LOOK_EVERY)}  # in which the graph is traversed again
