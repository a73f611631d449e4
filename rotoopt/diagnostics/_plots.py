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
    """Draw everything in one figure: losses, gradient norms, cosines and rotations.

    Args:
        history: What was recorded.

    Returns:
        The figure, of ``matplotlib.pyplot``: ``plt.show()`` shows it, ``figure.savefig(path)`` saves it.

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
        ['Losses', 'Gradient norms', 'Gradient cosines', 'Rotations, learning rate 0.02']
    """
    values, names = history.to_dict(), history.task_names
    figure, grid = new_figure(2, 2, len(names))
    panels = (draw_losses, draw_grad_norms, draw_cosines, draw_rotations)
    for ax, draw in zip(grid.flatten(), panels, strict=True):
        draw(ax, values, names)
    add_shared_legend(figure, grid[0, 1], grid[1, 0])  # the pairs of tasks have colors of their own
    return figure


def plot_losses(history: History, *, ax: Axes | None = None) -> Axes:
    """Draw the loss of every task over the steps.

    Lines are running medians, with all values faintly behind them; the axis is logarithmic where losses span decades.
    Of more than 7 tasks a map of colors shows how much every loss changed since the start, with gray where a task was
    absent.

    Args:
        history: What was recorded.
        ax: Where to draw, by default the axes of a new figure.

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
    """Draw the norm of every task's gradient at the representation: norms that lie decades apart are why tasks fight.

    Arguments, result and errors are those of :func:`plot_losses`.
    """
    return _plot(draw_grad_norms, history, ax)


def plot_cosines(history: History, *, ax: Axes | None = None) -> Axes:
    """Draw the cosines between the gradients of the tasks: below zero, a step for one is a step against the other.

    Of 2 or 3 tasks, every pair is a line. Of 4 to 7, every pair is a row of colors, and of more, every task is one,
    with its mean cosine with all others. Rows begin with the greatest conflict.

    Arguments, result and errors are those of :func:`plot_losses`.
    """
    return _plot(draw_cosines, history, ax)


def plot_rotations(history: History, *, ax: Axes | None = None) -> Axes:
    """Draw how far every rotation turned so far, and the learning rate of the rotations.

    The line of a rotation that settles becomes flat. It is the length of the way, so one that turns to and fro rises,
    too. A learning rate that changes is a dashed line.

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
