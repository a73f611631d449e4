"""Mutation testing of the mathematics: which small changes of the code does no test notice?

    pip install mutmut==3.8.1
    python -m tests.benchmarks.mutation --out mutation             # half an hour on two cores; it resumes
    cd mutation/weighting && mutmut results && mutmut show NAME    # the survivors, and what one changed

Runs mutmut in copies of the repository and prints a table. mutmut leaves decorated functions alone, and much of the
mathematics is under ``@torch.no_grad()``: there, a decorator becomes a call behind the function.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The tests that each module answers to: all others would run again for every survivor.
TESTS = {
    "rotations": ["test_rotations", "bad_input/test_representations", "contract/test_checkpoint"],
    "rotation_step": ["test_rotation_step", "test_devices", "contract/test_checkpoint"],
    "weighting": ["test_weighting", "test_special_cases", "bad_input/test_construction"],
    "normalization": ["test_normalization", "contract/test_checkpoint"],
    "capture": ["test_capture", "bad_input", *(f"contract/test_{name}" for name in ("calls", "copies", "evaluation"))],
}
# Those that mutmut knows how to keep, and one that has no function to call.
KEPT = ("staticmethod", "classmethod", "overload", "abstractmethod")


def copy_repository(folder: Path, module: str) -> None:
    """Copy what the tests need, with decorators of the module as calls and the settings of mutmut."""
    folder.mkdir(parents=True)
    for name in ("rotoopt", "tests", "examples", "docs", "README.md", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        else:
            shutil.copy(source, folder)
    path = folder / "rotoopt" / f"{module}.py"
    path.write_text(undecorated(path.read_text(encoding="utf-8")), encoding="utf-8")
    paths = [f"tests/{name}.py" if (ROOT / f"tests/{name}.py").exists() else f"tests/{name}" for name in TESTS[module]]
    settings = {
        "source_paths": ["rotoopt"],
        "only_mutate": [f"rotoopt/{module}.py"],
        "pytest_add_cli_args": ["-p", "no:xdist", "-p", "no:cacheprovider"],
        "pytest_add_cli_args_test_selection": paths,
    }
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{name} = {value!r}\n" for name, value in settings.items()))


def undecorated(code: str) -> str:
    """Write ``@decorator`` in front of a method as ``method = decorator(method)`` behind it."""
    lines = code.splitlines()
    for node in sorted(ast.walk(ast.parse(code)), key=lambda node: -getattr(node, "lineno", 0)):
        if not isinstance(node, ast.FunctionDef) or not node.decorator_list:
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if decorators[-1] in KEPT or ".setter" in decorators[-1]:
            continue
        moved = [each for each in decorators if each not in KEPT]
        assert node.end_lineno is not None
        indent = " " * node.col_offset
        calls = [f"{indent}{node.name} = {each}({node.name})" for each in reversed(moved)]
        if len(moved) < len(decorators):  # outermost, as in @staticmethod @once_differentiable
            calls.append(f"{indent}{node.name} = {decorators[0]}({node.name})")
        lines[node.end_lineno : node.end_lineno] = calls
        del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines) + "\n"


def run(folder: Path, jobs: int) -> Counter[str]:
    """Run mutmut, and return the number of mutants by what became of them."""
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "mutation"}
    mutmut = [sys.executable, "-m", "mutmut"]
    subprocess.run([*mutmut, "run", "--max-children", str(jobs)], cwd=folder, env=environment, check=True)
    command = [*mutmut, "results", "--all", "true"]
    results = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    return Counter(line.rpartition(": ")[2] for line in results.splitlines() if ": " in line)


def table(counts: dict[str, Counter[str]]) -> str:
    """Return the table of the results."""
    lines = ["| module | mutants | killed | survived | % killed |", "|---|---:|---:|---:|---:|"]
    for module, of in {**counts, "all": sum(counts.values(), Counter())}.items():
        killed = of["killed"] + of["timeout"]
        lines.append(
            f"| `{module}` | {of.total()} | {killed} | {of.total() - killed} | {100 * killed / of.total():.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run mutmut for every module, and print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default="mutation", help="folder for the copies (mutation)")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes (2)")
    args = parser.parse_args()
    counts = {}
    for module in TESTS:
        folder = args.out / module
        if not folder.exists():
            copy_repository(folder, module)
        counts[module] = run(folder, args.jobs)
        print(table(counts), flush=True)


if __name__ == "__main__":
    main()
