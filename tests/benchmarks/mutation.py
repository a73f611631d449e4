"""Mutation testing of the mathematics: which small changes of the code does no test notice?

    pip install mutmut==3.8.1
    python -m tests.benchmarks.mutation                                 # hours on two cores; started again, it resumes
    python -m tests.benchmarks.mutation weighting _rotation/step        # a folder and a module
    cd mutation/_rotation/step && mutmut results && mutmut show NAME    # the survivors, and what one changed

Runs mutmut in copies of the repository, one per module, and prints a table. A copy stays as it was made: delete it
after a change of the module or of its tests. mutmut leaves decorated functions alone, and much of the mathematics is
under ``@torch.no_grad()``: there, a decorator becomes a call behind the function.
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
# The tests that answer for each module: all others would run again for every survivor.
TESTS = {
    "_capture/capture": ["capture/test_capture", "capture/test_taps", "contract/test_calls", "contract/test_copies"],
    "_capture/fork": ["capture/test_taps", "contract/test_calls", "bad_input/test_wiring"],
    "_capture/graph": ["bad_input/test_wiring", "bad_input/test_losses"],
    "_capture/hooks": ["capture/test_capture", "contract/test_hooks", "contract/test_evaluation"],
    "_capture/representation": ["capture/test_representation", "bad_input/test_representations"],
    "_capture/wiring": ["bad_input/test_wiring", "bad_input/test_losses"],
    "_engine/arguments": ["bad_input"],
    "_engine/engine": ["engine", "contract/test_calls", "contract/test_checkpoint", "test_devices"],
    "_engine/memory": ["engine", "contract/test_checkpoint", "test_devices"],
    "_engine/record": ["engine", "contract/test_copies"],
    "_rotation/cayley": ["rotation/test_cayley", "rotation/test_rotations", "rotation/test_drift"],
    "_rotation/cayley_step": [
        "rotation/test_cayley_step",
        "rotation/test_agreement",
        "rotation/test_runs",
        "contract/test_checkpoint",
        "test_devices",
    ],
    "_rotation/coordinates": [
        "rotation/test_coordinates",
        "bad_input/test_construction",
        "contract/test_checkpoint",
        "test_devices",
    ],
    "_rotation/rotations": ["rotation/test_rotations", "contract/test_checkpoint", "test_devices"],
    "_rotation/step": ["rotation/test_cayley_step", "rotation/test_coordinates"],
    "weighting/_aggregator": ["weighting/test_weighting", "bad_input/test_construction"],
    "weighting/_gradients": ["weighting/test_gradients", "weighting/test_weighting", "test_devices"],
    "weighting/_gradnorm": [
        "weighting/test_weighting",
        "weighting/test_own_weighting",
        "bad_input/test_construction",
        "contract/test_checkpoint",
        "test_devices",
    ],
    "weighting/_measurements": [
        "weighting/test_references",
        "weighting/test_own_weighting",
        "capture/test_taps",
        "test_devices",
    ],
    "weighting/_weighting": ["weighting/test_weighting", "weighting/test_own_weighting", "test_devices"],
    "_deploy/first_layers": ["deploy/test_first_layers", "deploy/test_fold", "bad_input/test_deployment"],
    "_deploy/fold": ["deploy/test_fold", "bad_input/test_deployment"],
    "_deploy/refresh": ["deploy/test_refresh", "bad_input/test_deployment"],
    "rotograd/_modules": ["rotograd/test_modules", "official/test_equals_official"],
    "rotograd/_rotation_parameter": ["rotograd/test_modules"],
    "rotograd/_state_dict": ["rotograd/test_modules"],
    "regularization/_attention": ["regularization/test_channel_attention"],
    "regularization/_contrastive_encoder": [
        "regularization/test_bi_tuning",
        "regularization/test_bi_tuning_input",
        "regularization/test_bi_tuning_state",
    ],
    "regularization/_feature_maps": ["regularization/test_feature_maps", "regularization/test_delta"],
    "regularization/_inputs": [
        "regularization/test_distillation",
        "regularization/test_co_tuning",
        "regularization/test_bi_tuning_input",
        "regularization/test_bi_tuning_state",
        "regularization/test_channel_attention",
    ],
    "regularization/_key_queues": ["regularization/test_key_queues"],
    "regularization/_layer_getter": ["regularization/test_layer_getter"],
    "regularization/_named_tensors": ["regularization/test_starting_point", "regularization/test_delta"],
    "regularization/_pooling": ["regularization/test_lwf_classifier", "regularization/test_bi_tuning_input"],
    "regularization/_starting_point": ["regularization/test_starting_point", "regularization/test_delta"],
    "regularization/bi_tuning": [
        "regularization/test_bi_tuning",
        "regularization/test_bi_tuning_input",
        "regularization/test_bi_tuning_state",
        "regularization/test_bi_tuning_rotated",
    ],
    "regularization/bss": ["regularization/test_bss"],
    "regularization/co_tuning": [
        "regularization/test_co_tuning",
        "regularization/test_co_tuning_ranks",
        "regularization/test_lwf_classifier",
    ],
    "regularization/lwf": [
        "regularization/test_lwf",
        "regularization/test_lwf_classifier",
        "regularization/test_distillation",
        "regularization/test_record_logits",
    ],
}
# What mutmut puts around every function breaks the graphs of torch.compile.
COMPILES = "graph_breaks or one_piece or compiled_model"
# Those that mutmut knows how to keep, and one that has no function to call.
KEPT = ("staticmethod", "classmethod", "overload", "abstractmethod")


def copy_repository(folder: Path, module: str) -> None:
    """Copy what the tests need, with decorators of the module as calls and the settings of mutmut."""
    folder.mkdir(parents=True)
    for name in ("rotoopt", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "rotoopt" / f"{module}.py"
    path.write_text(undecorated(path.read_text(encoding="utf-8")), encoding="utf-8")
    paths = [f"tests/{name}.py" if (ROOT / f"tests/{name}.py").exists() else f"tests/{name}" for name in TESTS[module]]
    settings = {
        "source_paths": ["rotoopt"],
        "only_mutate": [f"rotoopt/{module}.py"],
        "pytest_add_cli_args": ["-p", "no:xdist", "-p", "no:cacheprovider", "-k", f"not ({COMPILES})"],
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
    """Run mutmut for every module that is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("modules", nargs="*", help="modules or folders of them, as in the table below (all)")
    parser.add_argument("--out", type=Path, default="mutation", help="folder for the copies (mutation)")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes (2)")
    args = parser.parse_args()
    counts = {}
    for module in TESTS:
        if args.modules and module not in args.modules and module.split("/")[0] not in args.modules:
            continue
        folder = args.out / module
        if not folder.exists():
            copy_repository(folder, module)
        counts[module] = run(folder, args.jobs)
        print(table(counts), flush=True)


if __name__ == "__main__":
    main()
