"""The picture of the comparison: how far every method is from one network per task, problem by problem.

python -m tests.benchmarks.comparison_picture --out docs/images/quality.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch

from tests.benchmarks.comparison import NAMES, load
from tests.benchmarks.comparison_methods import DEFAULT, PLAIN_SUM, SINGLE_TASK
from tests.benchmarks.comparison_tables import LIMIT, relative_changes, tested
from tests.benchmarks.problems import PROBLEMS

SHOWN = (PLAIN_SUM, "scale only", "GradNorm", "TorchJD IMTLG", "TorchJD FairGrad", "TorchJD UPGrad", DEFAULT)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", type=Path, default="comparison.json", help="what the comparison has written")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (10)")
    parser.add_argument("--out", type=Path, default="quality.png", help="the picture (quality.png)")
    args = parser.parse_args()
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    results = load(args.results)
    metrics = {name: tested(PROBLEMS[name], results, args.seeds) for name in NAMES}
    metrics = {name: of for name, of in metrics.items() if SINGLE_TASK in of}
    shown = [method for method in SHOWN if all(method in of for of in metrics.values())]
    columns = -(-len(metrics) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(2.6 * columns, 6), sharey=True, layout="constrained")
    for axis, (name, of) in zip(axes.flat, metrics.items(), strict=False):
        changes = relative_changes(PROBLEMS[name], of)
        axis.set_title(name)
        axis.axvline(0, color="0.6", linewidth=1)
        for row, method in enumerate(reversed(shown)):
            values = changes[method].clamp(-LIMIT, LIMIT).mean(dim=1)
            error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.zeros(())
            color = "tab:red" if method == DEFAULT else "tab:blue"
            axis.errorbar(values.mean(), row, xerr=error, fmt="o", markersize=5, color=color, capsize=2)
        axis.set_yticks(range(len(shown)), [*reversed(shown)])
    for axis in axes.flat[len(metrics) :]:
        axis.remove()
    figure.supxlabel("Delta-m against one network per task, % (metrics clipped to 100; higher is better)")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
