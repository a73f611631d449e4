"""Quality study: what scaling and rotations do to test metrics, against scaling alone, over seeds.

    python -m tests.benchmarks.quality --jobs 2             # everything; interrupt it, and it resumes
    python -m tests.benchmarks.quality --tables             # the tables, as Markdown
    python -m tests.benchmarks.quality --problems 'digits*' --methods 'scale only' 'identity*' --seeds 3

Every method starts from the same weights and sees the same batches. Needs scikit-learn, torchjd and what the
digit-pair example needs: ``pip install -e '.[dev]'``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path

import torch

from tests.benchmarks.problems import PROBLEMS
from tests.benchmarks.quality_methods import METHOD_SETS, Method
from tests.benchmarks.quality_results import Run, load, save
from tests.benchmarks.quality_tables import markdown


def run(problem: str, method: str, seed: int) -> Run:
    """Train once."""
    trial = PROBLEMS[problem].make(seed)
    chosen = next(m for m in METHOD_SETS[PROBLEMS[problem].methods] if m.name == method)
    torch.manual_seed(seed)  # for Haar rotations and random aggregators
    training = chosen.training(trial)
    start = time.perf_counter()
    metrics = training.run()
    return Run(problem, method, seed, metrics, time.perf_counter() - start)


def jobs(problems: list[str], methods: list[str], num_seeds: int) -> Iterator[tuple[str, str, int]]:
    """Yield the runs of the study that match one of the patterns, seed by seed: early results are paired."""
    for problem in PROBLEMS.values():
        if not _matches(problem.name, problems):
            continue
        chosen: list[Method] = [m for m in METHOD_SETS[problem.methods] if _matches(m.name, methods)]
        for seed in range(num_seeds):
            for method in chosen:
                yield problem.name, method.name, seed


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def main() -> None:
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--problems", nargs="+", default=["*"], help="names or patterns, of: " + ", ".join(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (10)")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, of one thread each (1)")
    parser.add_argument("--out", type=Path, default="quality.json", help="where results are kept (quality.json)")
    parser.add_argument("--tables", action="store_true", help="print the tables of --out and run nothing")
    args = parser.parse_args()

    runs = load(args.out)
    if args.tables:
        print(markdown([run for run in runs if _matches(run.problem, args.problems) and run.seed < args.seeds]))
        return
    done = {(run.problem, run.method, run.seed) for run in runs}
    missing = [job for job in jobs(args.problems, args.methods, args.seeds) if job not in done]
    # Spawned, not forked: a process that has used torch's thread pool must not be forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(run, *job) for job in missing]
        for count, future in enumerate(as_completed(futures), start=1):
            runs.append(future.result())
            save(runs, args.out)
            last = runs[-1]
            print(f"{count}/{len(missing)}  {last.problem} | {last.method} | seed {last.seed} | {last.seconds:.1f} s")


if __name__ == "__main__":
    main()
