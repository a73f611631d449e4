"""Panels: what each plot shows, for few tasks and for many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotoopt.diagnostics._drawing import (
    COLORS,
    MAX_LINES,
    SEQUENTIAL,
    add_second_line,
    draw_lines,
    draw_map,
    matplotlib,
    note,
    tidy,
)
from rotoopt.diagnostics._measurements import pairs
from rotoopt.diagnostics._smoothing import bin_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes", dict[str, Tensor], Sequence[str]], None]

MAX_PAIRS_AS_LINES = 3  # 3 tasks have 3 pairs, 4 have 6
MAX_TASKS_IN_PAIRS = 7  # 7 tasks have 21 pairs, each of them a row
MAX_NAME = 18  # characters of a task in the name of a pair
FIRST_BINS = 50  # the first loss is the mean over the first of this many bins


def draw_losses(ax: Axes, values: dict[str, Tensor], names: Sequence[str]) -> None:
    """Losses as lines; for many tasks, their changes as a map."""
    losses = torch.where(values["losses"].isfinite(), values["losses"], torch.nan)
    tidy(ax, "Losses", "loss")
    if losses.isnan().all():
        note(ax, "The losses are unknown:\npass them to step() or backward().")
    elif len(names) <= MAX_LINES:
        draw_lines(ax, values["step"], losses, names, COLORS, can_be_log=True)
    else:
        change, meaning = _change_from_first(losses)
        draw_map(ax, values["step"], change, names, meaning=meaning, centered=True)


def draw_grad_norms(ax: Axes, values: dict[str, Tensor], names: Sequence[str]) -> None:
    """Norms as lines, or as colors on a logarithmic scale."""
    norms, meaning = values["grad_norms"], "norm at the representation"
    tidy(ax, "Gradient norms", meaning)
    if len(names) <= MAX_LINES:
        draw_lines(ax, values["step"], norms, names, COLORS, can_be_log=True)
    else:
        logarithmic = matplotlib("colors").LogNorm() if (norms > 0).any() else None
        draw_map(ax, values["step"], norms, names, meaning=meaning, cmap=SEQUENTIAL, norm=logarithmic)


def draw_cosines(ax: Axes, values: dict[str, Tensor], names: Sequence[str]) -> None:
    """Cosines: up to 3 pairs as lines, the pairs of up to 7 tasks as colors, else means over the other tasks."""
    cosines, K = values["cosines"], len(names)
    tidy(ax, "Gradient cosines", "conflict  ←  cosine  →  agreement")
    if K == 1:
        note(ax, "There is only one task.")
    elif not _of_pairs(cosines).isfinite().any():
        note(ax, "No batch contains two tasks.")
    elif len(pairs(K)) <= MAX_PAIRS_AS_LINES:
        labels = [f"{names[i]}, {names[j]}" for i, j in pairs(K)]
        draw_lines(ax, values["step"], _of_pairs(cosines), labels, COLORS[::-1])
        ax.axhline(0, color="0.3", linewidth=0.8)
    elif K <= MAX_TASKS_IN_PAIRS:
        labels = [f"{_short(names[i])}, {_short(names[j])}" for i, j in pairs(K)]
        _draw_cosine_map(ax, values["step"], _of_pairs(cosines), labels)
    else:
        others = torch.where(torch.eye(K, dtype=torch.bool), torch.nan, cosines).nanmean(dim=2)
        tidy(ax, "Gradient cosines, mean over the other tasks", "")
        _draw_cosine_map(ax, values["step"], others, names)


def draw_rotations(ax: Axes, values: dict[str, Tensor], names: Sequence[str]) -> None:
    """Angles that the rotations have turned by so far, and their learning rate."""
    angles, rates, meaning = values["total_angles"], values["rotation_lr"], "turned so far, radians"
    changes = bool((rates != rates[0]).any())
    tidy(ax, _rotations_title(rates, changes=changes), meaning)
    if angles.isnan().all():
        note(ax, "Angles are unknown:\nyour own optimizer updates the rotations.")
    elif (angles == 0).all():
        note(ax, "The rotations did not turn.")
    elif len(names) <= MAX_LINES:
        draw_lines(ax, values["step"], angles, names, COLORS)
        ax.set_ylim(bottom=0)
        if changes:
            add_second_line(ax, values["step"], rates, "learning rate")
    else:
        draw_map(ax, values["step"], angles, names, meaning=meaning, cmap=SEQUENTIAL)


def _rotations_title(rates: Tensor, *, changes: bool) -> str:
    first, last = rates[0].item(), rates[-1].item()
    if math.isnan(first):
        return "Rotations"
    return f"Rotations, learning rate {first:.3g}" + (f" to {last:.3g}" if changes else "")


def _of_pairs(cosines: Tensor) -> Tensor:
    """Return the cosines of the pairs of tasks. ``(T, K, K)`` to ``(T, K (K - 1) / 2)``."""
    return torch.stack([cosines[:, i, j] for i, j in pairs(cosines.shape[-1])], dim=1)


def _draw_cosine_map(ax: Axes, steps: Tensor, series: Tensor, labels: Sequence[str]) -> None:
    """Draw cosines as colors, the greatest conflict in the first row."""
    order = series.nanmean(dim=0).nan_to_num(torch.inf).argsort().tolist()
    labels = [labels[row] for row in order]
    draw_map(ax, steps, series[:, order], labels, meaning="conflict  ←  cosine  →  agreement", centered=True)


def _change_from_first(losses: Tensor) -> tuple[Tensor, str]:
    """Return the change of every loss since its first value, and the meaning of the number."""
    bins = bin_means(losses, min(len(losses), FIRST_BINS))
    known = ~bins.isnan()
    first = bins.gather(0, known.int().argmax(dim=0, keepdim=True))[0]
    if (losses[~losses.isnan()] > 0).all():
        return (losses / first).log10(), "log10 of loss / first loss"
    largest = torch.where(known, bins - first, 0.0).abs().amax(dim=0)
    return (losses - first) / torch.where(largest > 0, largest, 1.0), "change of the loss / its largest change"


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
