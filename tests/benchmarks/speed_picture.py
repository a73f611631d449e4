"""The picture of the speed page: what a step takes longer than a plain one, over what K fixed layers add, by case.

python -m tests.benchmarks.speed_picture --results speed.json --out docs/images/speed.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from tests.benchmarks.cases import FLOOR, NAMED, PLAIN, ROTOOPT, TORCHJD
from tests.benchmarks.overhead import LIMIT, OFFICIAL

SHOWN = {ROTOOPT: ("tab:blue", "o"), TORCHJD: ("tab:orange", "s"), OFFICIAL: ("tab:red", "D")}


def added(seconds: dict[str, list[float]], variant: str) -> float:
    """Return the median of what a step takes longer than the plain one of the same round."""
    return statistics.median(own - plain for own, plain in zip(seconds[variant], seconds[PLAIN], strict=False))


def by_case(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the added time over the floor, by case and variant."""
    titles = {case.description: name for name, case in NAMED.items()}
    found = {}
    for result in (result for of_case in results["cases"].values() for result in of_case):
        seconds = result["seconds"]
        floor = added(seconds, FLOOR)
        found[titles[result["title"]]] = {name: added(seconds, name) / floor for name in SHOWN if name in seconds}
    return found


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", type=Path, default="speed.json", help="what overhead.py has written")
    parser.add_argument("--out", type=Path, default="speed.png", help="the picture (speed.png)")
    args = parser.parse_args()
    mpl.use("Agg")

    ratios = by_case(json.loads(args.results.read_text()))
    for name, of_case in ratios.items():
        print(name, {variant: round(ratio, 2) for variant, ratio in of_case.items()})
    figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for variant, (color, marker) in SHOWN.items():
        rows = [(ratio[variant], row) for row, ratio in enumerate(ratios.values()) if variant in ratio]
        label = "rotoopt, default" if variant == ROTOOPT else variant
        axis.plot(*zip(*rows, strict=True), marker, color=color, label=label)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.axvspan(1.0, LIMIT, color="tab:green", alpha=0.15)
    axis.set_xscale("log")
    axis.set_yticks(range(len(ratios)), list(ratios))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("time added to a plain step, over that of K fixed d x d layers (1: the floor; left is better)")
    axis.legend(fontsize="small")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
