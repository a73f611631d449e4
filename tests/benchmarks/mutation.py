"""Mutation testing of the mathematics: which small changes of the code does no test notice?

    pip install mutmut==3.8.1
    python -m tests.benchmarks.mutation --out mutation             # about an hour on two cores; it resumes
    cd mutation && mutmut show NAME                                # what a survivor changed

Runs mutmut in a copy of the repository and prints a table. mutmut leaves decorated functions alone, and much of the
mathematics is under ``@torch.no_grad()``: in the copy, a decorator becomes a call behind the function.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = ("rotations", "rotation_step", "weighting", "normalization", "capture")
TESTS = (
    *(f"tests/test_{name}.py" for name in (*MODULES, "gradients", "homogenize", "special_cases", "record", "devices")),
    "tests/test_equals_oracle.py::test_every_combination_of_options_equals_the_oracle",
    "tests/bad_input",
    *(
        f"tests/contract/test_{name}.py"
        for name in ("accumulation", "calls", "checkpoint", "copies", "evaluation", "hooks")
    ),
)
# Those that mutmut knows how to keep, and one that has no function to call.
KEPT = ("staticmethod", "classmethod", "overload", "abstractmethod")


def copy_repository(folder: Path) -> None:
    """Copy what the tests need, with decorators as calls and the settings of mutmut."""
    for name in ("rotoopt", "tests", "examples", "docs", "README.md", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder)
    for module in MODULES:
        path = folder / "rotoopt" / f"{module}.py"
        path.write_text(undecorated(path.read_text(encoding="utf-8")), encoding="utf-8")
    settings = {
        "source_paths": ["rotoopt"],
        "only_mutate": [f"rotoopt/{module}.py" for module in MODULES],
        "pytest_add_cli_args": ["-p", "no:xdist", "-p", "no:cacheprovider"],
        "pytest_add_cli_args_test_selection": list(TESTS),
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


def table(results: str) -> str:
    """Return the table of what ``mutmut results --all true`` prints."""
    counts: dict[str, Counter[str]] = {module: Counter() for module in MODULES}
    for line in results.splitlines():
        name, _, outcome = line.strip().partition(": ")
        if outcome:
            counts[name.split(".")[1]][outcome] += 1
    lines = ["| module | mutants | killed | survived | % killed |", "|---|---:|---:|---:|---:|"]
    for module, of in {**counts, "all": sum(counts.values(), Counter())}.items():
        survived = of["survived"] + of["no tests"] + of["not checked"]
        killed = of.total() - survived
        lines.append(f"| {module} | {of.total()} | {killed} | {survived} | {100 * killed / of.total():.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run mutmut and print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default="mutation", help="folder for the copy (mutation)")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes (2)")
    args = parser.parse_args()
    if not args.out.exists():
        copy_repository(args.out)
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "dev"}
    subprocess.run(["mutmut", "run", "--max-children", str(args.jobs)], cwd=args.out, env=environment, check=True)
    command = ["mutmut", "results", "--all", "true"]
    print(table(subprocess.run(command, cwd=args.out, check=True, capture_output=True, text=True).stdout))


if __name__ == "__main__":
    main()
