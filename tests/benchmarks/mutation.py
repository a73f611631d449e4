"""Mutation testing: which small changes of the code does no test detect?

    pip install mutmut==3.8.1
    python -m tests.benchmarks.mutation _rotation                       # half an hour on two cores
    python -m tests.benchmarks.mutation _engine --ending 37             # a fifth of the mutants
    cd mutation/_rotation && mutmut results && mutmut show NAME         # the survivors, and the change of one

Runs mutmut in a copy of the repository, and prints a table by module. Started again, it resumes in the copy, which is
not updated: delete it after a change. mutmut skips decorated functions, and much of the mathematics is under
``@torch.no_grad()``, so the copy replaces decorators by calls behind the functions.
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
# Each package is tested with the folder of tests that has its name, and with the tests of all packages: bad input is an
# error, resumed runs are bit-identical, the state follows the representation to its device.
OF_ALL = ("bad_input", "contract/test_checkpoint.py", "test_devices.py")
# Packages that compute, with the further tests of each. The others plot, log, help to test, or delegate to these. Code
# that every training loop executes is also tested with training loops.
PACKAGES: dict[str, tuple[str, ...]] = {
    "_rotation": (),
    "weighting": (),
    "_capture": (
        "engine",
        "contract",
        "branching/test_batches.py",
        "branching/test_bypasses.py",
        "branching/test_compiled.py",
        "branching/test_changes.py",
        "deploy/test_copies.py",
        "deploy/test_latest_weights.py",
        "deploy/test_whereabouts.py",
        "testing/test_miswired_models.py",
    ),
    "_engine": (
        "capture",
        "branching/test_batches.py",
        "branching/test_bypasses.py",
        "branching/test_compiled.py",
        "branching/test_changes.py",
        *(f"contract/test_{name}.py" for name in ("accumulation", "amp", "calls", "copies")),
        "distributed/test_distributed_checkpoint.py",
        "test_equals_oracle.py",
    ),
    "_deploy": ("capture/test_places.py",),
    "comparison": (),
    "rotograd": (),
    "regularization": (),
}
# The wrappers that mutmut adds to functions break the graphs of torch.compile and strict export; mypy runs no function;
# and the pages are not copied.
GRAPHS = "graph_breaks or one_piece or compiled_model or test_compile or (export and (True or strict))"
LEFT_OUT = f"{GRAPHS} or test_types or page_says"
# A mutant is done at the first test that fails, and mutmut passes the tests in any order.
SHORTEST_FIRST = """
import json
from pathlib import Path


def pytest_collection_modifyitems(items):
    stats = Path("mutmut-stats.json")
    if stats.exists():
        durations = json.loads(stats.read_text())["duration_by_test"]
        items.sort(key=lambda item: durations.get(item.nodeid, 0.0))
"""
# What draws: sizes and places of texts and dots.
DRAWS = ["rotoopt/comparison/_picture.py"]
# Those that mutmut can keep, and one that has no function to call.
KEPT = ("staticmethod", "classmethod", "overload", "abstractmethod")


def copy_repository(folder: Path, package: str) -> None:
    """Copy what the tests need, with the decorators replaced by calls, and write the settings of mutmut."""
    folder.mkdir(parents=True)
    for name in ("rotoopt", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path in (folder / "rotoopt" / package).glob("*.py"):
        path.write_text(undecorated(path.read_text(encoding="utf-8")), encoding="utf-8")
    # A warning points to the first line outside of the package, which must not be in a wrapper of mutmut.
    warn = folder / "rotoopt" / "_torch" / "warn.py"
    warn.write_text(warn.read_text(encoding="utf-8").replace('"torch")', '"torch", "mutmut")'), encoding="utf-8")
    (folder / "conftest.py").write_text(SHORTEST_FIRST, encoding="utf-8")
    tests = dict.fromkeys((package.strip("_"), *OF_ALL, *PACKAGES[package]))
    settings = {
        "source_paths": ["rotoopt"],
        "only_mutate": [f"rotoopt/{package}/*"],
        "do_not_mutate": DRAWS,
        "also_copy": ["conftest.py"],
        "pytest_add_cli_args": ["-p", "no:xdist", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})"],
        "pytest_add_cli_args_test_selection": [f"tests/{name}" for name in tests],
    }
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{name} = {value!r}\n" for name, value in settings.items()))


def undecorated(code: str) -> str:
    """Replace ``@decorator`` in front of a function by ``function = decorator(function)`` behind it."""
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


def run(folder: Path, jobs: int, ending: str | None) -> dict[str, Counter[str]]:
    """Run mutmut, and return the number of mutants by module and result.

    Args:
        folder: The copy.
        jobs: Number of processes.
        ending: Run only mutants whose number within their function ends in one of these digits.
    """
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "mutation"}
    mutmut = [sys.executable, "-m", "mutmut"]
    names = [] if ending is None else [f"*__mutmut_*[{ending}]"]
    subprocess.run([*mutmut, "run", "--max-children", str(jobs), *names], cwd=folder, env=environment, check=True)
    command = [*mutmut, "results", "--all", "true"]
    results = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    counts: dict[str, Counter[str]] = {}
    for line in results.splitlines():
        mutant, _, end = line.strip().rpartition(": ")
        if mutant and end != "not checked":  # rotoopt.<package>.<module>.<function>
            counts.setdefault(mutant.split(".")[2], Counter())[end] += 1
    return counts


def table(counts: dict[str, Counter[str]]) -> str:
    """Return the table of the results."""
    lines = ["| module | mutants | killed | % |", "|---|---:|---:|---:|"]
    for module, of in {**counts, "all": sum(counts.values(), Counter())}.items():
        killed = of["killed"] + of["timeout"]
        lines.append(f"| `{module}` | {of.total()} | {killed} | {100 * killed / of.total():.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run mutmut for a package, and print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("package", choices=PACKAGES, help="what to change")
    parser.add_argument("--out", type=Path, default="mutation", help="folder for the copies (mutation)")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes (2)")
    parser.add_argument("--ending", help="only mutants whose number ends in one of these digits, as a sample")
    args = parser.parse_args()
    folder = args.out / args.package
    if not folder.exists():
        copy_repository(folder, args.package)
    print(table(run(folder, args.jobs, args.ending)))


if __name__ == "__main__":
    main()
