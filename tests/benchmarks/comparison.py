"""Comparison of methods on the problems: their metrics, and the time of their steps.

    python -m tests.benchmarks.comparison --jobs 2     # everything; resumes after an interruption
    python -m tests.benchmarks.comparison --time       # seconds per step, on a quiet machine
    python -m tests.benchmarks.comparison --tables     # the tables, as Markdown

For every method, one of six settings of the learning rates is chosen by the mean relative change against one network
per task on three separate seeds; the tables show other seeds. All methods start from the same weights and train on the
same batches. rotograd 0.1.6 runs in a separate environment, which is created on first use.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import torch

from rotoopt.comparison import _store as store
from rotoopt.comparison._processes import Failure, outcomes
from rotoopt.diagnostics import mean_relative_change
from tests.benchmarks.comparison_methods import METHODS, PLAIN_SUM, SINGLE_TASK, Method, Setting
from tests.benchmarks.comparison_run import Job, run
from tests.benchmarks.official_rotograd import make_environment
from tests.benchmarks.problems import PROBLEMS, Problem

NAMES = (
    "digits",
    "regression",
    "maps",
    "tokens",
    "toy",
    "kinds",
    "rates",
    "label noise",
    "capacity",
    "direction",
)
SEARCH_SEEDS = (1000, 1001, 1002)

BASELINES = (SINGLE_TASK, PLAIN_SUM)

Results = dict[Job, list[float]]


def search_jobs(problem: Problem, method: Method) -> list[Job]:
    """Return the trainings that choose the learning rates of a method; none for a variant of another method."""
    if method.variant is not None:
        return []
    return [
        Job(problem.name, method.name, setting.factor, setting.own_lr, seed)
        for seed in SEARCH_SEEDS
        for setting in method.settings(problem)
    ]


def choose(problem: Problem, method: Method, results: Results) -> Setting | None:
    """Return the setting with the best mean relative change; None if results are missing.

    A variant of a method has the setting of that method.
    """
    method = method if method.variant is None else METHODS[method.variant]
    yardstick = _search_mean(problem, METHODS[SINGLE_TASK], Setting(1.0), results)
    scores = {}
    for setting in method.settings(problem):
        mean = _search_mean(problem, method, setting, results)
        if yardstick is None or mean is None:
            return None
        finite = all(math.isfinite(value) for value in mean)
        signs = [metric.higher_is_better for metric in problem.metrics]
        scores[setting] = mean_relative_change(mean, yardstick, signs) if finite else -math.inf
    return max(scores, key=scores.__getitem__)


def _search_mean(problem: Problem, method: Method, setting: Setting, results: Results) -> list[float] | None:
    jobs = [Job(problem.name, method.name, setting.factor, setting.own_lr, seed) for seed in SEARCH_SEEDS]
    if any(job not in results for job in jobs):
        return None
    mean: list[float] = torch.tensor([results[job] for job in jobs], dtype=torch.float64).mean(dim=0).tolist()
    return mean


def final_jobs(problem: Problem, method: Method, results: Results, seeds: int, *, timed: bool = False) -> list[Job]:
    """Return the trainings of the tables, once the learning rates are chosen."""
    setting = choose(problem, method, results)
    if setting is None:
        return []
    return [Job(problem.name, method.name, setting.factor, setting.own_lr, seed, timed) for seed in range(seeds)]


def untuned_jobs(problem: Problem, method: Method, results: Results, seeds: int) -> list[Job]:
    """Return the trainings at the learning rate that is best for the plain sum; none for variants and baselines.

    Methods with a second learning rate have none either: without tuning, it is unknown.
    """
    setting = choose(problem, METHODS[PLAIN_SUM], results)
    if setting is None or method.own is not None or method.variant is not None or method.name in BASELINES:
        return []
    return [Job(problem.name, method.name, setting.factor, None, seed) for seed in range(seeds)]


def run_all(jobs: Sequence[Job], results: Results, num_processes: int, out: Path) -> None:
    """Run what is missing, and save every result immediately."""
    missing = [job for job in jobs if job not in results]
    for count, outcome in enumerate(outcomes(run, missing, num_processes), start=1):
        if isinstance(outcome.result, Failure):
            raise RuntimeError(f"{outcome.job} must run, got:\n{outcome.result.traceback}")
        results[outcome.job] = outcome.result
        store.save(out, ({"job": asdict(job), "values": values} for job, values in results.items()))
        print(f"{count}/{len(missing)}  {outcome.job}", flush=True)


def load(path: Path) -> Results:
    """Read the existing results."""
    return {Job(**entry["job"]): entry["values"] for entry in store.load(path)}


def main() -> None:
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--problems", nargs="+", default=["*"], help="names or patterns, of: " + ", ".join(NAMES))
    parser.add_argument("--methods", nargs="+", default=["*"], help="names or patterns, of: " + ", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (10)")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, of one thread each (1)")
    parser.add_argument("--out", type=Path, default="comparison.json", help="where results are kept (comparison.json)")
    parser.add_argument("--time", action="store_true", help="measure the time per step, one process at a time")
    parser.add_argument("--tables", action="store_true", help="print the tables of --out and run nothing")
    args = parser.parse_args()

    problems = [PROBLEMS[name] for name in NAMES if any(fnmatch(name, pattern) for pattern in args.problems)]
    methods = [m for m in METHODS.values() if any(fnmatch(m.name, pattern) for pattern in args.methods)]
    pairs = [(problem, method) for problem in problems for method in methods]
    results = load(args.out)
    if args.tables:
        from tests.benchmarks.comparison_tables import markdown

        print(markdown(problems, results, args.seeds))
        return
    if any(method.official for method in methods):
        make_environment()
    if args.time:
        run_all([job for pair in pairs for job in final_jobs(*pair, results, 1, timed=True)], results, 1, args.out)
        return
    run_all([job for pair in pairs for job in search_jobs(*pair)], results, args.jobs, args.out)
    run_all([job for pair in pairs for job in final_jobs(*pair, results, args.seeds)], results, args.jobs, args.out)
    run_all([job for pair in pairs for job in untuned_jobs(*pair, results, args.seeds)], results, args.jobs, args.out)


if __name__ == "__main__":
    main()
