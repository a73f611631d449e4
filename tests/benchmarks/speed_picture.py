"""The picture of the speed page: the time added to a plain step over that added by K fixed layers, by case.

python -m tests.benchmarks.speed_picture docs/benchmarks/speed.md docs/images/speed.png
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from tests.benchmarks.cases import FLOOR, NAMED, ROTOOPT, TORCHJD
from tests.benchmarks.overhead import LIMIT, OFFICIAL

ROW = re.compile(
    r"^\| ([^|]+) \| [\d.]+ \| [\d.]+ \| [\d.]+ - [\d.]+ \| (\S+) \|$", re.MULTILINE
)  # variant, added time
SHOWN = {ROTOOPT: ("tab:blue", "o"), TORCHJD: ("tab:orange", "s"), OFFICIAL: ("tab:red", "D")}


def ratios(page: str) -> dict[str, dict[str, float]]:
    """Return the added time over that of the fixed layers, by case and variant, from the first table of each case."""
    found = {}
    for name, case in NAMED.items():
        _, _, table = page.partition(f"### {case.description}\n")
        added = {variant: float(milliseconds) for variant, milliseconds in ROW.findall(table.partition("###")[0])}
        if added:
            found[name] = {variant: added[variant] / added[FLOOR] for variant in SHOWN if variant in added}
    return found


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("page", type=Path, help="the page with the tables of overhead.py")
    parser.add_argument("picture", type=Path, help="the picture to write")
    args = parser.parse_args()
    mpl.use("Agg")

    by_case = ratios(args.page.read_text())
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for variant, (color, marker) in SHOWN.items():
        points = [(of_case[variant], row) for row, of_case in enumerate(by_case.values()) if variant in of_case]
        label = "rotoopt, default" if variant == ROTOOPT else variant
        axis.plot(*zip(*points, strict=True), marker, color=color, label=label)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(left=0.2)
    axis.axvspan(0.2, LIMIT, color="tab:green", alpha=0.15)
    ticks = [0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks(range(len(by_case)), list(by_case))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("time added to a plain step, over that added by K fixed d x d layers (left is better)")
    axis.legend(fontsize="small")
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
