"""The core of the suite with the oldest and the newest torch, and with every installed Python.

    python tests/bounds.py                 # make test-bounds
    python tests/bounds.py 3.10 oldest     # one of them, as continuous integration does
    python tests/bounds.py 3.13 newest

The oldest Python gets the oldest torch and geotorch that pyproject.toml allows, every other one the newest torch that
pip finds for it. Interpreters that pyproject.toml lists but that are not installed are skipped. Each pair has an
environment in `.venv-bounds/`, which is kept. Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
ENVIRONMENTS = ROOT / ".venv-bounds"

# What the core needs besides the package, with the version of TorchJD that the numbers in its tests are from.
TOOLS = ("pytest", "hypothesis", "numpy", "torchjd[quadprog-projector]==0.18.0")
# Tests that depend on interfaces that change between releases: hooks, graphs, optimizers, compiling, exporting,
# state dicts. And the comparison with the oracle, which would detect other numbers.
CORE = (
    "tests/test_docs.py::test_page_runs_and_prints_what_it_says[README.md]",
    "tests/test_equals_oracle.py",
    "tests/test_special_cases.py",
    "tests/test_api.py",
    "tests/bad_input",
    "tests/branching/test_truth.py",
    "tests/capture",
    "tests/contract",
    "tests/engine",
    "tests/weighting",
    "tests/regularization/test_delta.py",
    "tests/regularization/test_bss.py",
    "tests/rotograd",
)
NOT_CORE = ("tests/contract/test_types.py",)  # mypy checks every version from one


def declared_pythons() -> list[str]:
    """Return the versions in the classifiers of the package, the oldest first."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', SETTINGS)


def lower_bounds() -> list[str]:
    """Return requirements for the oldest torch and geotorch that the package allows."""
    found = dict(re.findall(r'^    "(torch|geotorch)>=([\d.]+)"', SETTINGS, re.MULTILINE))
    return [f"{name}=={found[name]}" for name in ("torch", "geotorch")]


def interpreter(version: str) -> str | None:
    """Return the interpreter of this version, on the path or of pyenv; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
    for candidate in filter(None, candidates):
        asked = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if asked.stdout.strip() == version:  # otherwise, it is a shim for a version that is not activated
            return candidate
    return None


def pairs(pythons: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of Python and torch to test."""
    newest = pythons[1:] or pythons
    return [(pythons[0], "oldest"), *((version, "newest") for version in newest)]


def run(version: str, torch: str) -> tuple[str, bool]:
    """Set up one environment, run the core in it, and return what was run and whether all of it passed."""
    python = interpreter(version)
    if python is None:
        return f"Python {version}: not here, skipped", True
    folder = ENVIRONMENTS / f"{version}-{torch}"
    own = str(folder / "bin" / "python")
    wanted = ["torch", "geotorch"] if torch == "newest" else lower_bounds()
    print(
        f"\nPython {version}, {torch} torch: installing {', '.join(wanted)} into {folder.relative_to(ROOT)}", flush=True
    )
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    subprocess.run([own, "-m", "pip", "install", "--upgrade", *wanted], check=True)
    subprocess.run([own, "-m", "pip", "install", "-q", *wanted, *TOOLS, "-e", str(ROOT)], check=True)
    names = (
        "import platform, torch, geotorch; print(platform.python_version(), torch.__version__, geotorch.__version__)"
    )
    found = subprocess.run([own, "-c", names], check=True, capture_output=True, text=True).stdout.split()

    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "dev"}
    ignored = [f"--ignore={path}" for path in NOT_CORE]
    command = [own, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *ignored, *CORE]
    passed = subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
    seconds = time.monotonic() - started
    what = "Python {}, torch {}, geotorch {}".format(*found)
    return f"{what}: {'passed' if passed else 'FAILED'}, {seconds:.0f} s", passed


def main() -> None:
    """Run the selected pairs, and print a summary."""
    if len(sys.argv) == 3:
        asked = [(sys.argv[1], sys.argv[2])]
    else:
        at_hand = [version for version in declared_pythons() if interpreter(version) is not None]
        if not at_hand:
            sys.exit(f"One of Python {', '.join(declared_pythons())} must be on the path, got none. Install one.")
        asked = pairs(at_hand)
        asked += [(version, "newest") for version in declared_pythons() if version not in at_hand]
    results = [run(version, torch) for version, torch in asked]
    print("\n" + "\n".join(summary for summary, _ in results))
    if not all(passed for _, passed in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
