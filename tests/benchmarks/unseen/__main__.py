"""Compare methods on the unseen problems, and print by how much errors are lower than those of the plain sum."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rotoopt.comparison import Comparison, compare
from tests.benchmarks.unseen import GROUPS, PROBLEMS
from tests.benchmarks.unseen.table import markdown
from tests.benchmarks.unseen.training import PLAIN_SUM, methods, train


def results(name: str, seeds: int, num_processes: int, folder: Path) -> Comparison:
    """Run what is missing on one problem."""
    comparison = compare(
        partial(train, name),
        candidates=methods(name),
        higher_is_better=dict.fromkeys(PROBLEMS[name].metrics, False),
        seeds=seeds,
        baseline=PLAIN_SUM,
        path=folder / f"{name}.json",
        processes=num_processes,
    )
    if comparison.failures:
        raise RuntimeError(f"Every run must succeed, got the failures {dict(comparison.failures)}.")
    return comparison


def main() -> None:
    """Run what is missing, and print a table of each group."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.unseen", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (5)")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, of one thread each (1)")
    parser.add_argument("--out", type=Path, default="unseen", help="folder where results are kept (unseen)")
    parser.add_argument(
        "--problems", nargs="+", choices=PROBLEMS, default=[*PROBLEMS], metavar="NAME", help="which problems (all)"
    )
    args = parser.parse_args()
    for title, group in GROUPS.items():
        chosen = [name for name in group if name in args.problems]
        if chosen:
            table = markdown({name: results(name, args.seeds, args.jobs, args.out) for name in chosen})
            print(f"{title}\n\n{table}\n")


if __name__ == "__main__":
    main()
