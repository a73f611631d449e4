"""The picture of the comparison: Delta-m of every method against one network per task, by problem.

python -m tests.benchmarks.comparison_picture --out docs/images/quality.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch

from rotoopt.comparison._picture import draw_changes, label, new_figure
from rotoopt.comparison._statistics import LIMIT
from tests.benchmarks.comparison import NAMES, load
from tests.benchmarks.comparison_methods import DEFAULT, PLAIN_SUM, SINGLE_TASK
from tests.benchmarks.comparison_tables import clipped, relative_changes, tested
from tests.benchmarks.problems import PROBLEMS

SHOWN = (
    PLAIN_SUM,
    "scale only",
    "GradNorm",
    "TorchJD IMTLG",
    "TorchJD NashMTL",
    "TorchJD FairGrad",
    "TorchJD UPGrad",
    "TorchJD DualProj",
    DEFAULT,
)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", type=Path, default="comparison.json", help="what the comparison has written")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (10)")
    parser.add_argument("--out", type=Path, default="quality.png", help="the picture (quality.png)")
    args = parser.parse_args()
    mpl.use("Agg")

    results = load(args.results)
    metrics = {name: tested(PROBLEMS[name], results, args.seeds) for name in NAMES}
    metrics = {name: of for name, of in metrics.items() if SINGLE_TASK in of}
    shown = [method for method in SHOWN if any(method in of for of in metrics.values())]
    figure, axes = new_figure(2, -(-len(metrics) // 2), num_rows=len(shown))
    for axis, (name, of) in zip(axes.flat, metrics.items(), strict=False):
        changes = relative_changes(PROBLEMS[name], of)
        rows = {method: clipped(changes[method]) if method in changes else torch.empty(0) for method in shown}
        draw_changes(axis, rows, name, highlighted=DEFAULT)
    for axis in axes.flat[len(metrics) :]:
        axis.remove()
    label(figure, f"Delta-m against one network per task, % (metrics clipped to {LIMIT:.0f}; right is better)")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
