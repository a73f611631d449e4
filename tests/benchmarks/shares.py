"""Which operations, and which code, take the time of a training with ``RotoGradOptimizer``: two Markdown tables.

python -m tests.benchmarks.shares "K = 40, d = 512" [--threads 2]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import rotoopt
from rotoopt.optimizer import TURN_EVERY
from tests.benchmarks.cases import NAMED, PLAIN, ROTOOPT, SCALE_ONLY, Case, Training

PACKAGE = Path(rotoopt.__file__).parent
CPU = torch.device("cpu")
Times = Counter[tuple[str, str]]  # milliseconds by the operation and the shapes of its inputs


def times(training: Training, steps: int) -> Times:
    """Return the times of the operations in ``steps`` steps, each without the operations that it calls."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(steps):
            training.step()
    found: Times = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)
        found[event.key.removeprefix("aten::"), shapes] += event.self_cpu_time_total / 1e3
    return found


def table(case: Case, rows: int) -> str:
    """Return the shares of the ``rows`` operations that take the most time in a step that updates the rotations."""
    training = Training(case, ROTOOPT, CPU)
    for _ in range(TURN_EVERY):
        training.step()
    update, rest = times(training, 1), times(training, TURN_EVERY - 1)
    lines = ["| operation | shapes | share of the step with an update | share of all steps |", "|---|---|---:|---:|"]
    for key, milliseconds in update.most_common(rows):
        shares = milliseconds / update.total(), (milliseconds + rest[key]) / (update.total() + rest.total())
        lines.append(f"| {' | '.join([*key, *(f'{share:.1%}' for share in shares)])} |")
    whole = update.total() / (update.total() + rest.total())
    return "\n".join([*lines, f"| all | | 100.0% | {whole:.1%} in the step with an update |"])


def by_code(training: Training) -> Counter[str]:
    """Return the microseconds per step between two updates by kind of code, from ``cProfile``, which adds some."""
    for _ in range(TURN_EVERY + 1):
        training.step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(TURN_EVERY - 1):
        training.step()
    profiler.disable()
    found: Counter[str] = Counter()
    for (file, _, _), (_, _, seconds, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        path = Path(file)
        kind = f"`{path.relative_to(PACKAGE).parts[0]}`" if PACKAGE in path.parents else "Python of torch"
        found["operations" if file == "~" else kind] += 1e6 * seconds / (TURN_EVERY - 1)
    return found


def code_table(case: Case) -> str:
    """Return what ``rotoopt`` adds to a plain step, by kind of code."""
    variants = (PLAIN, SCALE_ONLY, ROTOOPT)
    plain, *others = (by_code(Training(case, variant, CPU)) for variant in variants)
    kinds = sorted(others[-1], key=lambda kind: plain[kind] - others[-1][kind])
    lines = [f"| added, us | {' | '.join(variants[1:])} |", "|---|---:|---:|"]
    lines += [f"| {kind} | {' | '.join(f'{of[kind] - plain[kind]:.0f}' for of in others)} |" for kind in kinds]
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("case", nargs="?", choices=NAMED, default="K = 40, d = 512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(table(NAMED[args.case], args.rows))
    print(f"\n{code_table(NAMED[args.case])}")


if __name__ == "__main__":
    main()
