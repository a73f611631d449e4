"""Plot: changes against the baseline as dots, one row per candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rotoopt.comparison._statistics import LIMIT, mean_and_error
from rotoopt.diagnostics._drawing import COLORS, matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rotoopt.comparison._comparison import Comparison

INK = "#7a7a7a"  # of texts and axes: contrast 4.3 to 1 against both white and black pages
BLUE, ORANGE = COLORS[0], COLORS[1]


def draw(comparison: Comparison) -> Figure:
    """Draw Delta-m and the change of every metric."""
    columns = ["Delta-m", *comparison.higher_is_better]
    figure, axes = new_figure(1, len(columns), num_rows=len(comparison.metrics))
    for column, (ax, title) in enumerate(zip(axes.flat, columns, strict=True)):
        if column == 0:
            changes = {name: comparison.delta_m(name, clipped=True) for name in comparison.metrics}
        else:
            changes = {
                name: comparison.changes(name)[:, column - 1].clamp(-LIMIT, LIMIT) for name in comparison.metrics
            }
        draw_changes(ax, changes, title, highlighted="default")
    baseline = comparison.baseline if isinstance(comparison.baseline, str) else "the given numbers"
    label(figure, f"change against {baseline}, % (clipped to {LIMIT:.0f}; right is better)")
    return figure


def new_figure(num_rows_of_axes: int, num_columns: int, *, num_rows: int) -> tuple[Figure, Any]:
    """Return a transparent figure, and its array of axes with ``num_rows`` candidates each."""
    size = (1.5 + 2.1 * num_columns, num_rows_of_axes * (0.7 + 0.26 * num_rows) + 0.4)
    figure, axes = matplotlib("pyplot").subplots(
        num_rows_of_axes, num_columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    figure.patch.set_alpha(0)
    return figure, axes


def label(figure: Figure, text: str) -> None:
    """Label the horizontal axes."""
    figure.supxlabel(text, fontsize="medium", color=INK)


def draw_changes(ax: Axes, changes: Mapping[str, Tensor], title: str, *, highlighted: str) -> None:
    """Plot the change of every candidate: a faint dot per seed, and a dot with a bar for mean and standard error.

    Args:
        ax: The axes.
        changes: Percent by candidate, NaN where unknown. Shape ``(seeds,)`` each.
        title: Of the axes.
        highlighted: The candidate that has another color.
    """
    ax.patch.set_alpha(0)
    ax.axvline(0, color=INK, linewidth=0.8)
    names = list(changes)[::-1]
    for place, name in enumerate(names):
        known = changes[name][changes[name].isfinite()]
        if len(known) == 0:
            continue
        color = ORANGE if name == highlighted else BLUE
        ax.plot(known.numpy(), [place] * len(known), "o", markersize=3, alpha=0.35, color=color, markeredgewidth=0)
        mean, error = mean_and_error(known)
        ax.errorbar(mean, place, xerr=error, fmt="o", markersize=5, color=color, capsize=2)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.5, len(names) - 0.5)
    ax.set_title(title, loc="left", fontsize="medium", color=INK)
    ax.tick_params(colors=INK)
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)
