"""The cost of RotoGradOptimizer: Markdown tables of step times, their ratios to the plain step, and the bars to meet.

    python tests/benchmarks/overhead.py [--case NAME ...] [--threads 2] [--device cpu|cuda] [--json PATH]

All variants of a case take turns in blocks of consecutive steps, a multiple of 8 each, since a part of the work is only
done every few steps. So a slow minute of the machine affects all of them, and every ratio and difference is computed
within one round before the median over the rounds is taken. If other programs run at the same time, this is not
enough: measure CPU time on one thread with --threads 1 --cpu-time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from rotoopt.optimizer import TURN_EVERY
from tests.benchmarks import cases
from tests.benchmarks.cases import FLOOR, NO_UPDATES, PLAIN, ROTOOPT, SCALE_ONLY, TORCHJD, Case, Training
from tests.benchmarks.official_rotograd import OfficialRotograd, make_environment
from tests.benchmarks.timing import machine, seconds_per_step, synchronization, take_turns

CASES: dict[str, list[Case]] = {
    "resnet18": [cases.RESNET18],
    "stress": [cases.STRESS],
    "growth": list(cases.GROWTH.values()),
    "many": [cases.MANY],
    "maps": [cases.MAPS],
    "tokens": [cases.TOKENS],
    "relu": [case for name, case in cases.NAMED.items() if name.startswith("ReLU")],
}
OFFICIAL = "rotograd 0.1.6.0"
OFFICIAL_ROUNDS = 3  # of one step: it takes seconds
TORCHJD_ROUNDS, TORCHJD_STEPS = 3, 4  # every step does the same, and takes longer
LIMIT = 1.5  # times the floor


@dataclass(frozen=True)
class Bar:
    """A measured number and its upper limit."""

    what: str
    measured: float
    limit: float

    def row(self) -> str:
        """Return a row of a table."""
        met = "yes" if self.measured <= self.limit else "NO"
        return f"| {self.what} | {self.measured:.3g} | {self.limit:.3g} | {met} |"


@dataclass
class Result:
    """Seconds per step in every block of every variant of one case, in the order of the rounds."""

    title: str
    seconds: dict[str, list[float]]
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ratios(self, variant: str) -> list[float]:
        """Return the step times over the plain ones of the same rounds."""
        return [own / plain for own, plain in zip(self.seconds[variant], self.seconds[PLAIN], strict=False)]

    def added(self, variant: str) -> float:
        """Return the median of the time added to the plain step of the same round, in seconds."""
        pairs = zip(self.seconds[variant], self.seconds[PLAIN], strict=False)
        return statistics.median(own - plain for own, plain in pairs)

    def log_added(self, variant: str) -> float:
        """Return its logarithm; NaN, which meets no bar, if it is below the noise."""
        added = self.added(variant)
        return math.log(added) if added > 0 else math.nan

    def markdown(self) -> str:
        """Return the tables."""
        lines = [
            f"### {self.title}\n",
            "| variant | step, ms | x plain | quartiles | added, ms |",
            "|---|---|---|---|---|",
        ]
        for variant, seconds in self.seconds.items():
            low, middle, high = statistics.quantiles(self.ratios(variant), n=4, method="inclusive")
            step, added = 1e3 * statistics.median(seconds), 1e3 * self.added(variant)
            lines.append(f"| {variant} | {step:.2f} | {middle:.3f} | {low:.3f} - {high:.3f} | {added:.2f} |")
        if self.bars:
            lines += ["", "| bar | measured | at most | met |", "|---|---|---|---|", *[bar.row() for bar in self.bars]]
        return "\n".join([*lines, "", *[f"{note}\n" for note in self.notes]])


def parts(results: Sequence[Result]) -> str:
    """Return the table of the parts of the time that rotoopt adds, as multiples of that of the layers."""
    names = {case.description: name for name, case in cases.NAMED.items()}
    lines = ["### Parts of the added time, times that of the layers\n"]
    lines += ["| case | all | weighting | rotations | updates |", "|---|---:|---:|---:|---:|"]
    for result in results:
        layers, weighting, without, whole = (
            1e3 * result.added(variant) for variant in (FLOOR, SCALE_ONLY, NO_UPDATES, ROTOOPT)
        )
        found = (whole, weighting, without - weighting, whole - without)
        lines.append(f"| {names[result.title]} | {' | '.join(f'{part / layers:.2f}' for part in found)} |")
    return "\n".join(lines)


def measure(case: Case, args: argparse.Namespace, *, autocast: bool) -> Result:
    """Measure the step times of one case."""
    device = torch.device(args.device)
    trainings = {variant: Training(case, variant, device, autocast=autocast) for variant in case.variants}
    timer = partial(seconds_per_step, steps=args.block, cpu_time=args.cpu_time)
    timers: dict[str, Callable[[], float]] = {name: partial(timer, training) for name, training in trainings.items()}
    at_most = {TORCHJD: TORCHJD_ROUNDS}
    if TORCHJD in timers:
        timers[TORCHJD] = partial(timer, trainings[TORCHJD], steps=TORCHJD_STEPS)
    result = Result(case.description + (", bfloat16 autocast" if autocast else ""), {})
    if TORCHJD in timers:
        result.notes.append(f"{TORCHJD}: mtl_backward and {type(cases.torchjd_aggregator()).__name__}.")
    official = start_official(trainings[PLAIN], args, result.notes) if case is cases.STRESS and not autocast else None
    if official is None:
        result.seconds = take_turns(timers, args.rounds, at_most)
    else:
        with official:
            timers[OFFICIAL] = partial(official.seconds_per_step, 1)
            result.seconds = take_turns(timers, args.rounds, {**at_most, OFFICIAL: OFFICIAL_ROUNDS})
    if device.type == "cuda":
        result.notes.append(f"Synchronization in step(losses, rep): {synchronization(trainings[ROTOOPT], args.block)}.")
    return result


def start_official(plain: Training, args: argparse.Namespace, notes: list[str]) -> OfficialRotograd | None:
    """Start the official package on the network of ``plain``, if its environment can be created."""
    try:
        make_environment()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        notes.append(f"{OFFICIAL}: skipped, its environment cannot be made: {reason.strip().splitlines()[-1]}")
        return None
    notes.append(f"{OFFICIAL}: at most {OFFICIAL_ROUNDS} blocks of one step, in a process of its own.")
    d = plain.forward()[1].shape[-1]
    network = (plain.backbone, plain.heads, plain.batch, plain.targets)
    return OfficialRotograd(*network, d=d, threads=args.threads, cpu_time=args.cpu_time)


def bars(name: str, results: list[Result], args: argparse.Namespace) -> list[Bar]:
    """Return the bars for the step times of a case."""
    result = results[-1]
    floor = [Bar(f"added / added by {FLOOR}", math.exp(result.log_added(ROTOOPT) - result.log_added(FLOOR)), LIMIT)]
    if name == "resnet18":
        return [*floor, Bar("rotoopt / plain", statistics.median(result.ratios(ROTOOPT)), 1.05)]
    if name == "growth":
        added = [result.log_added(ROTOOPT) for result in results]
        slope = statistics.linear_regression([math.log(d) for d in cases.GROWTH], added).slope
        return [*floor, Bar("exponent of the added time in d", slope, 2.1)]
    if OFFICIAL in result.seconds:
        ratio = math.exp(result.log_added(ROTOOPT) - result.log_added(OFFICIAL))
        floor.append(Bar(f"added / added by {OFFICIAL}", ratio, 1 / 60))
    return floor


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure what RotoGradOptimizer costs.")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--block", type=int, default=TURN_EVERY, help="steps in a block, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=15, help="blocks of every variant, at least 2")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine; with --threads 1")
    parser.add_argument("--json", type=Path, help="where to write all block times")
    args = parser.parse_args()
    if args.block < 1 or args.block % 8 or args.rounds < 2:
        parser.error("--block must be a multiple of 8, and --rounds at least 2")
    if args.cpu_time and (args.threads != 1 or args.device != "cpu"):
        parser.error("--cpu-time needs --threads 1 and --device cpu")  # waiting threads use CPU time, too
    return args


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    measured_on = machine(args.threads, args.device)
    clock = "CPU time" if args.cpu_time else "wall time"
    print(f"{measured_on}; {args.rounds} blocks of {args.block} steps, {clock}\n", flush=True)
    report: dict[str, list[Result]] = {}
    for autocast in [False, True] if args.device == "cuda" else [False]:
        for name in args.case:
            results = [measure(case, args, autocast=autocast) for case in CASES[name]]
            results[-1].bars = bars(name, results, args)
            report[f"{name}, bfloat16" if autocast else name] = results
            print("\n".join(result.markdown() for result in results), flush=True)
            if args.json is not None:
                content = {name: [asdict(result) for result in results] for name, results in report.items()}
                args.json.write_text(json.dumps({"machine": measured_on, "clock": clock, "cases": content}, indent=1))
    if args.device == "cpu":
        print(parts([result for results in report.values() for result in results]))


if __name__ == "__main__":
    main()
