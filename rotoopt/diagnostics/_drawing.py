"""Drawing: lines for a few series over the steps, a color map for many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotoopt.diagnostics._optional import require
from rotoopt.diagnostics._smoothing import MIN_SMOOTHED, bin_means, outline, running_median

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# From the palette of Okabe and Ito, which color-blind readers can distinguish, without its yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MAX_LINES = len(COLORS)
LINE_HEIGHT = 0.01  # share of the axis: a line hides another that is closer than its thickness
LOG_SPAN = 20.0  # an axis is logarithmic from this ratio of the largest to the smallest value
MAX_COLUMNS = 80  # of a map
ROW_HEIGHT = 0.125  # inches; the rows of a map have labels
DIVERGING = "PuOr_r"  # orange is high, purple is low: distinguishable by color-blind readers
SEQUENTIAL = "cividis"
LEGEND_WIDTH, LEGEND_HANDLE = 150, 8  # characters in a figure of two columns, and in place of a handle
SECOND_AXIS_WIDTH = 7.5  # of its labels, in font sizes
ABSENT = "0.82"  # a light gray


def matplotlib(module: str) -> Any:
    """Import a module of matplotlib; if it is missing, raise an error that says how to install it."""
    return require(f"matplotlib.{module}", install="pip install matplotlib")


def new_figure(num_rows: int, num_columns: int, num_tasks: int) -> tuple[Figure, Any]:
    """Return a figure and its array of axes, taller if a map of this many tasks needs it."""
    height = max(4.0, ROW_HEIGHT * num_tasks + 1.0)
    size = (1.5 + 6.0 * num_columns, height * num_rows)
    figure, grid = matplotlib("pyplot").subplots(num_rows, num_columns, figsize=size, layout="constrained")
    return figure, grid


def tidy(ax: Axes, title: str, ylabel: str) -> None:
    """Set title and label of ``ax``, and remove unnecessary spines."""
    ax.set_title(title, loc="left")
    ax.set_xlabel("step")
    ax.set_ylabel(ylabel)
    ax.spines[["top", "right"]].set_visible(False)


def note(ax: Axes, text: str) -> None:
    """Write why ``ax`` is empty."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.4")
    ax.set_axis_off()


def draw_lines(
    ax: Axes, steps: Tensor, values: Tensor, labels: Sequence[str], colors: Sequence[str], *, can_be_log: bool = False
) -> None:
    """Plot the running median of every column of ``values`` (T, n), with all values faintly behind it.

    A line that covers an earlier one is dashed, so that both are visible.

    Args:
        ax: The axes.
        steps: Shape ``(T,)``.
        values: NaN where there is none.
        labels: One per column; they are in the legend that :func:`add_legend` makes.
        colors: At least one per column.
        can_be_log: Whether the axis may be logarithmic; it is if the medians span decades.
    """
    places, medians = running_median(values)
    if can_be_log and spans_decades(medians):
        ax.set_yscale("log", nonpositive="mask")
    for column, (label, color) in enumerate(zip(labels, colors, strict=False)):
        series = values[:, column]
        measured = series.isfinite().nonzero().squeeze(1)
        if len(values) >= MIN_SMOOTHED:  # fewer values are not smoothed
            positions, raw = outline(series[measured])
            ax.plot(steps[measured[positions]].numpy(), raw.numpy(), color=color, alpha=0.2, linewidth=0.6, zorder=1)
        known = medians[:, column].isfinite()
        x, y = steps[places[known]].numpy(), medians[known, column].numpy()
        below = num_coinciding(medians[:, : column + 1], log=ax.get_yscale() == "log")
        style: Any = (0, (4, 4 * below)) if below else "solid"
        ax.plot(x, y, color=color, linewidth=2, linestyle=style, label=label, marker="o" if len(x) == 1 else None)
    ax.grid(axis="y", alpha=0.3)


def spans_decades(values: Tensor) -> bool:
    """Whether all finite values are positive, and the largest is many times the smallest."""
    finite = values[values.isfinite()]
    return finite.numel() > 0 and bool(finite.min() > 0) and bool(finite.max() / finite.min() > LOG_SPAN)


def num_coinciding(values: Tensor, *, log: bool) -> int:
    """Return how many columns of ``values`` (T, n) the last column covers in a plot."""
    heights = values.log() if log else values
    finite = heights[heights.isfinite()]
    if not finite.numel():
        return 0
    gaps = (heights[:, :-1] - heights[:, -1:]).abs()
    return int(((gaps <= LINE_HEIGHT * (finite.max() - finite.min())) | gaps.isnan()).all(dim=0).sum())


def add_legend(ax: Axes) -> None:
    """Put a legend beside the data, in the order of the ends of the lines."""
    lines = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    if not lines:
        return
    lines.sort(key=_end, reverse=True)
    place = ax.get_position().bounds
    twins = [other for other in ax.get_shared_x_axes().get_siblings(ax) if other.get_position().bounds == place]
    pad = SECOND_AXIS_WIDTH if len(twins) > 1 else 0.5
    ax.legend(handles=lines, loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=pad, frameon=False)


def _end(line: Line2D) -> float:
    values = torch.as_tensor(line.get_ydata())
    return values[-1].item() if len(values) else -math.inf


def add_second_line(ax: Axes, steps: Tensor, values: Tensor, label: str) -> None:
    """Plot ``values`` (T,), which have another unit, as a dashed gray line with an axis on the right."""
    second = ax.twinx()
    if spans_decades(values):
        second.set_yscale("log")
    second.plot(steps.numpy(), values.numpy(), color="0.45", linewidth=1.2, linestyle=(0, (5, 2)))
    second.set_ylabel(f"{label} (dashed)", color="0.35")
    second.tick_params(colors="0.35")
    second.spines[:].set_visible(False)


def draw_map(
    ax: Axes,
    steps: Tensor,
    values: Tensor,
    labels: Sequence[str],
    *,
    meaning: str,
    centered: bool = False,
    **colors: Any,
) -> None:
    """Plot every column of ``values`` (T, n) as a row of colors, averaged over bins of steps.

    Args:
        ax: The axes.
        steps: Shape ``(T,)``.
        values: NaN, where there is none, is gray.
        labels: One per column.
        meaning: The meaning of the colors.
        centered: Whether the center of the color map is zero. Its range then excludes the most extreme 2 percent.
        **colors: Options of ``pcolormesh``.
    """
    num_bins = min(len(values), MAX_COLUMNS)
    cells = bin_means(torch.where(values.isfinite(), values.double(), torch.nan), num_bins)
    if centered:
        limit = cells[cells.isfinite()].abs().quantile(0.98).item()
        colors |= {"cmap": DIVERGING, "vmin": -limit, "vmax": limit}
    edges = [*(part[0].item() for part in steps.tensor_split(num_bins)), steps[-1].item() + 1]
    rows = [row - 0.5 for row in range(len(labels) + 1)]
    ax.set_facecolor(ABSENT)
    drawn = ax.pcolormesh(edges, rows, cells.mT.numpy(), **colors)
    ax.set_ylabel("")
    ax.set_yticks(range(len(labels)), labels, fontsize=9 if len(labels) <= 20 else 7)
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(drawn, ax=ax, label=meaning, pad=0.02)
    bar.outline.set_visible(False)


def add_shared_legend(figure: Figure, *axes: Axes) -> None:
    """Put one legend for the lines of several axes above them."""
    handles, labels = [], []
    for ax in axes:
        more_handles, more_labels = ax.get_legend_handles_labels()
        handles += more_handles
        labels += more_labels
    if handles:
        num_rows = math.ceil(sum(len(label) + LEGEND_HANDLE for label in labels) / LEGEND_WIDTH)
        columns = math.ceil(len(labels) / num_rows)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
