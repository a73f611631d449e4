"""The table and the picture of the digit-pair example."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digit_pairs_data import TASKS, Pairs
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

# From the Okabe-Ito palette, which is safe for color-blind readers; the dashes help in print.
STYLES: dict[str, dict[str, Any]] = {
    "one network per task": {"color": "#555555", "linestyle": (0, (5, 2))},
    "plain sum": {"color": "#0072b2", "linestyle": (0, (1, 1))},
    "RotoGrad": {"color": "#d55e00", "linestyle": "solid"},
}


@dataclass(frozen=True)
class Result:
    """The results of one method on S seeds, with E epochs and K tasks."""

    metrics: Tensor  # (S, E, K), on the test pairs
    cosines: Tensor | None  # (S, E, K, K), where the method measures them
    ms_per_step: Tensor  # (S,), milliseconds of one training step

    @classmethod
    def join(cls, results: list["Result"]) -> "Result":
        """Concatenate the results of several seeds."""
        cosines = [result.cosines for result in results if result.cosines is not None]
        return cls(
            torch.cat([result.metrics for result in results]),
            torch.cat(cosines) if cosines else None,
            torch.cat([result.ms_per_step for result in results]),
        )

    def change_from(self, reference: "Result") -> Tensor:
        """Change of the last metrics in percent, seed by seed, ``(S, K)``; positive is better."""
        signs = torch.tensor([1 if task.higher_is_better else -1 for task in TASKS])
        last, other = self.metrics[:, -1], reference.metrics[:, -1]
        return 100 * signs * (last - other) / other.abs()


def plus_minus(values: Tensor, sign: str = "") -> str:
    """Write the numbers of several seeds as mean and standard deviation (0 for a single seed)."""
    mean, std = values.mean(), values.std(correction=min(1, len(values) - 1))
    decimals = 2 if abs(mean) < 10 else 1 if abs(mean) < 100 else 0
    return f"{mean:{sign}.{decimals}f} ± {std:.{decimals}f}"


def print_table(results: Mapping[str, Result]) -> None:
    """Print the final test metrics of every method, their change against the first method, and the time."""
    (first, reference), *others = results.items()
    changes = [result.change_from(reference) for _, result in others]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("test metric", no_wrap=True)
    for name in results:
        table.add_column(name.replace(" per ", "\nper "), justify="right")
    for k, task in enumerate(TASKS):
        values = [plus_minus(result.metrics[:, -1, k]) for result in results.values()]
        table.add_row(f"{task.name} ({task.unit})", *values)
    table.add_section()
    for k, task in enumerate(TASKS):
        values = [plus_minus(change[:, k], sign="+") for change in changes]
        table.add_row(f"change, {task.name}", "", *values)
    delta_m = [plus_minus(change.mean(dim=1), sign="+") for change in changes]
    table.add_row("Delta-m", "", *delta_m, style="bold")
    table.add_section()
    table.add_row("ms per step", *(plus_minus(result.ms_per_step) for result in results.values()))

    console = Console(highlight=False)
    console.print("", table, sep="\n")
    console.print(
        f"\nMean ± standard deviation, seeds: {len(reference.metrics)}. Changes: in percent, against "
        f"{first}; positive is better.\nDelta-m: the mean of the changes. "
        f"A step of {first}: one step of all {len(TASKS)}.\n"
    )


def save_picture(results: Mapping[str, Result], pairs: Pairs, path: Path) -> None:
    """Draw inputs, the learning curves of every task, and the cosines between its gradients."""
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    grid = figure.subplots(2, 4).flatten()
    draw_pairs(grid[0], pairs)
    for k, axes in enumerate(grid[1:6]):
        draw_learning_curves(axes, results, k)
    for name, result in results.items():
        if result.cosines is not None:
            draw_cosine_map(grid[6], name, result.cosines)
            draw_mean_cosine(grid[7], name, result.cosines)
    handles, labels = grid[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)


def draw_pairs(axes: Axes, pairs: Pairs, rows: int = 3) -> None:
    """Draw the first canvases as one mosaic, the digits above each."""
    images = F.pad(pairs.images[: rows * rows, 0], (1, 1, 4, 0))  # room for the digits
    height, width = images.shape[1:]
    mosaic = images.view(rows, rows, height, width).transpose(1, 2)
    axes.imshow(mosaic.reshape(rows * height, rows * width).numpy(), cmap="gray_r")
    for i in range(rows * rows):
        left, right = (pairs.targets[f"{side} digit"][i] for side in ("left", "right"))
        x, y = (i % rows + 0.5) * width - 0.5, i // rows * height + 2.5
        axes.text(x, y, f"{left} and {right}", ha="center", va="bottom")
    axes.set_title("test pairs")
    axes.set_axis_off()


def draw_learning_curves(axes: Axes, results: Mapping[str, Result], k: int) -> None:
    """Draw the test metric of task k against the epoch."""
    task = TASKS[k]
    for name, result in results.items():
        draw_over_epochs(axes, name, result.metrics[:, :, k])
    axes.set_title(task.name)
    axes.set_ylabel(f"{task.unit}, {'higher' if task.higher_is_better else 'lower'} is better")
    if not task.higher_is_better:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def draw_mean_cosine(axes: Axes, name: str, cosines: Tensor) -> None:
    """Draw the mean cosine of two different tasks against the epoch."""
    num_tasks = cosines.shape[-1]
    different = ~torch.eye(num_tasks, dtype=torch.bool)
    draw_over_epochs(axes, name, cosines[:, :, different].mean(dim=-1))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title("mean gradient cosine of two tasks")
    axes.set_ylabel("cosine")


def draw_over_epochs(axes: Axes, name: str, values: Tensor) -> None:
    """Draw values ``(S, E)``: their mean over the seeds, in a band from lowest to highest."""
    epochs = range(1, values.shape[1] + 1)
    color = STYLES[name]["color"]
    axes.plot(epochs, values.mean(dim=0), label=name, linewidth=2, **STYLES[name])
    axes.fill_between(epochs, values.amin(dim=0), values.amax(dim=0), color=color, alpha=0.18, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_cosine_map(axes: Axes, name: str, cosines: Tensor) -> None:
    """Draw the cosine of every pair of tasks, averaged over seeds and epochs."""
    mean = cosines.mean(dim=(0, 1))
    mean.fill_diagonal_(torch.nan)  # always 1: it would only hide the others
    limit = mean.nan_to_num().abs().max().item()
    axes.imshow(mean.numpy(), cmap="PuOr_r", vmin=-limit, vmax=limit)
    for i, j in itertools.permutations(range(len(TASKS)), 2):
        value = round(mean[i, j].item(), 2) + 0.0  # -0.0 + 0.0 is 0.0
        color = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
    names = [task.name.replace(" ", "\n") for task in TASKS]
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_title(f"gradient cosines, {name}")
