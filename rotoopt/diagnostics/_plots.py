"""Plots of a history: losses, gradient norms, conflicts and rotations over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rotoopt.diagnostics._drawing import add_legend, add_shared_legend, new_figure
from rotoopt.diagnostics._history import History
from rotoopt.diagnostics._panels import Panel, draw_cosines, draw_grad_norms, draw_losses, draw_rotations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_history(history: History) -> Figure:
    """Plot losses, gradient norms, cosines and rotations in one figure.

    Args:
        history: The recorded history.

    Returns:
        A figure of ``matplotlib.pyplot``: ``plt.show()`` shows it, ``figure.savefig(path)`` saves it.

    Raises:
        ImportError: If matplotlib is not installed (``pip install matplotlib``).
        RuntimeError: If nothing was recorded.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rotoopt import RotoGradOptimizer
        >>> backbone, heads = nn.Linear(3, 8), nn.ModuleDict({"left": nn.Linear(8, 1), "right": nn.Linear(8, 2)})
        >>> model = nn.Sequential(backbone, *heads.values())
        >>> optimizer = RotoGradOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), heads=heads)
        >>> history = History()
        >>> for _ in range(4):
        ...     z = backbone(torch.randn(5, 3))
        ...     optimizer.zero_grad()
        ...     optimizer.step([head(z).square().mean() for head in heads.values()], z)
        ...     history.record(optimizer)
        >>> figure = plot_history(history)
        >>> [ax.get_title(loc="left") for ax in figure.axes]
        ['Losses', 'Gradient norms', 'Gradient cosines', 'Rotations, learning rate 0.04']
    """
    values, names = history.to_dict(), history.task_names
    figure, grid = new_figure(2, 2, len(names))
    panels = (draw_losses, draw_grad_norms, draw_cosines, draw_rotations)
    for ax, draw in zip(grid.flatten(), panels, strict=True):
        draw(ax, values, names)
    add_shared_legend(figure, grid[0, 1], grid[1, 0])  # pairs of tasks have other colors
    return figure


def plot_losses(history: History, *, ax: Axes | None = None) -> Axes:
    """Plot the loss of every task over the steps.

    Lines are running medians, with all values faintly behind them; the axis is logarithmic if losses span decades.
    For more than 7 tasks, a color map shows how much every loss has changed since the start; gray means that the task
    was absent.

    Args:
        history: The recorded history.
        ax: The axes. Default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed (``pip install matplotlib``).
        RuntimeError: If nothing was recorded.

    Example:
        See :func:`plot_history`.
    """
    return _plot(draw_losses, history, ax)


def plot_grad_norms(history: History, *, ax: Axes | None = None) -> Axes:
    """Plot the norm of every task gradient at the representation. If they differ by decades, the largest dominate.

    Arguments, result and errors are those of :func:`plot_losses`.
    """
    return _plot(draw_grad_norms, history, ax)


def plot_cosines(history: History, *, ax: Axes | None = None) -> Axes:
    """Plot the cosines between the task gradients. Below zero, a step for one task increases the loss of the other.

    For 2 or 3 tasks, every pair is a line. For 4 to 7, every pair is a row of colors. For more, every task is a row,
    with its mean cosine with all others. Rows are sorted, starting with the greatest conflict.

    Arguments, result and errors are those of :func:`plot_losses`.
    """
    return _plot(draw_cosines, history, ax)


def plot_rotations(history: History, *, ax: Axes | None = None) -> Axes:
    """Plot how far every rotation has turned so far, and the learning rate of the rotations.

    The line becomes flat when a rotation has converged. It shows the accumulated angle, which also grows if a rotation
    turns back and forth. A learning rate that changes is shown as a dashed line.

    Arguments, result and errors are those of :func:`plot_losses`.
    """
    return _plot(draw_rotations, history, ax)


def _plot(draw: Panel, history: History, ax: Axes | None) -> Axes:
    values = history.to_dict()
    if ax is None:
        ax = new_figure(1, 1, len(history.task_names))[1]
    draw(ax, values, history.task_names)
    add_legend(ax)
    return ax
