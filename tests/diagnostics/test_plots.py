"""Plots show the numbers of a history, and are readable for 1 to 40 tasks."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from rotoopt.diagnostics import (
    History,
    plot_cosines,
    plot_grad_norms,
    plot_history,
    plot_losses,
    plot_rotations,
)
from tests.diagnostics.fakes import FakeOptimizer, random_history

Plot = Callable[..., Axes]
PLOTS: list[Plot] = [plot_losses, plot_grad_norms, plot_cosines, plot_rotations]
FIELDS: dict[Plot, str] = {plot_losses: "losses", plot_grad_norms: "grad_norms", plot_rotations: "total_angles"}


@pytest.fixture(autouse=True)
def figures_are_closed() -> Iterator[None]:
    matplotlib.use("Agg")
    plt.close("all")  # figures of a documentation page that ran in this process
    yield
    plt.close("all")


def lines(ax: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in ax.lines if not str(line.get_label()).startswith("_")}


def points(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = (torch.as_tensor(data).tolist() for data in line.get_data())
    return x, y


def mesh(ax: Axes) -> QuadMesh:
    (found,) = (child for child in ax.get_children() if isinstance(child, QuadMesh))
    return found


def cells(ax: Axes) -> Tensor:
    """Return the colors of a map as numbers, (rows, columns), NaN where there is none."""
    array: Any = mesh(ax).get_array()
    return torch.tensor(array.filled(float("nan")))


def row_labels(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


@pytest.mark.parametrize(
    ("K", "T", "absent"), [(1, 60, 0.0), (2, 1, 0.0), (3, 500, 0.5), (7, 60, 0.5), (8, 1, 0.0), (40, 200, 0.5)]
)
def test_every_history_can_be_drawn(K: int, T: int, absent: float) -> None:
    figure = plot_history(random_history(K, T, absent=absent))
    assert isinstance(figure, Figure)
    figure.canvas.draw()  # warnings are errors


UNUSUAL: list[tuple[Plot, dict[str, Any]]] = [
    (plot_losses, {"losses": None}),
    (plot_losses, {"losses": torch.full((9,), torch.inf)}),
    (plot_losses, {"losses": -torch.ones(9)}),
    (plot_losses, {"losses": torch.zeros(9)}),
    (plot_grad_norms, {"grad_norms": torch.zeros(9)}),
    (plot_grad_norms, {"grad_norms": torch.full((9,), torch.nan), "finite": torch.tensor(False)}),
    (plot_cosines, {"cosines": torch.zeros(9, 9)}),
    (plot_cosines, {"cosines": torch.full((9, 9), torch.nan)}),
    (plot_cosines, {"present": torch.arange(9) == 0}),
    (plot_rotations, {"total_angles": torch.zeros(9)}),
    (plot_rotations, {"rotation_lr": float("nan")}),
    (plot_rotations, {"rotation_lr": 0.5, "total_angles": torch.zeros(9)}),
]


@pytest.mark.parametrize("K", [3, 5, 9])
@pytest.mark.parametrize(("plot", "fields"), UNUSUAL)
def test_empty_panels_can_be_drawn(plot: Plot, fields: dict[str, Any], K: int) -> None:
    own: dict[str, Any] = {
        name: value[:K] if isinstance(value, Tensor) and value.dim() else value for name, value in fields.items()
    }
    if "cosines" in own:
        own["cosines"] = own["cosines"][:, :K]
    plot(random_history(K, 60, **own)).figure.canvas.draw()


@pytest.mark.parametrize("plot", FIELDS, ids=lambda plot: plot.__name__)
def test_lines_show_the_numbers(plot: Plot) -> None:
    history = random_history(3, 20, absent=0.3, names=["a", "b", "c"])
    values = history.to_dict()
    drawn = lines(plot(history))
    assert set(drawn) == {"a", "b", "c"}
    for task, name in enumerate("abc"):
        series = values[FIELDS[plot]][:, task]
        known = series.isfinite()
        assert points(drawn[name])[0] == values["step"][known].tolist()
        assert points(drawn[name])[1] == series[known].tolist()


def test_lines_of_pairs_show_their_cosines() -> None:
    history = random_history(3, 20, names=["a", "b", "c"])
    cosines = history.to_dict()["cosines"]
    drawn = lines(plot_cosines(history))
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert points(drawn[f"{'abc'[i]}, {'abc'[j]}"])[1] == cosines[:, i, j].tolist()


def test_long_series_are_smoothed_in_front_of_their_values() -> None:
    history = random_history(2, 300, names=["a", "b"])
    ax = plot_losses(history)
    assert len(ax.lines) == 4
    for name, line in lines(ax).items():
        (raw,) = (other for other in ax.lines if other is not line and other.get_color() == line.get_color())
        assert points(raw)[1] == history.to_dict()["losses"][:, "ab".index(name)].tolist()
        assert raw.get_zorder() < line.get_zorder()
        assert (raw.get_alpha() or 1) < 0.5
        roughness, rough = (torch.tensor(points(each)[1]).diff().abs().mean() for each in (line, raw))
        assert roughness < rough / 3


@pytest.mark.parametrize(("K", "rows"), [(4, 6), (7, 21), (8, 8), (40, 40)])
def test_maps_of_conflicts_begin_with_the_greatest(K: int, rows: int) -> None:
    names = [f"t{task}" for task in range(K)]
    history = random_history(K, 30, names=names)
    cosines = history.to_dict()["cosines"]
    ax = plot_cosines(history)
    shown, labels = cells(ax), row_labels(ax)
    assert shown.shape == (rows, 30)
    means = shown.mean(dim=1)
    assert (means.diff() >= 0).all()
    assert ax.yaxis_inverted()  # the first row is at the top
    low, high = mesh(ax).get_clim()
    assert low == -high  # zero is white
    assert 0.9 < (shown.abs() <= high).double().mean() < 1
    for row, label in enumerate(labels):
        i, *others = [names.index(name) for name in label.split(", ")]
        others = others or [other for other in range(K) if other != i]
        torch.testing.assert_close(shown[row], cosines[:, i, others].mean(dim=1).double())


@pytest.mark.parametrize("plot", FIELDS, ids=lambda plot: plot.__name__)
def test_maps_of_tasks_show_the_numbers(plot: Plot) -> None:
    history = random_history(9, 30, absent=0.3)
    values = history.to_dict()[FIELDS[plot]].double()
    if plot is plot_losses:
        first = torch.stack([series[series.isfinite()][0] for series in values.T])
        values = (values / first).log10()
    ax = plot(history)
    torch.testing.assert_close(cells(ax), values.T, equal_nan=True)
    assert row_labels(ax) == list(history.task_names)


def test_negative_losses_are_scaled_by_their_largest_change() -> None:
    losses = torch.linspace(-2, 3, 9)
    history, optimizer = History(), FakeOptimizer([f"t{task}" for task in range(9)])
    for change in (0.0, -1.0, 0.5):
        history.record(optimizer.step(losses=losses + change))
    torch.testing.assert_close(cells(plot_losses(history)), torch.tensor([[0.0, -1.0, 0.5]]).double().expand(9, 3))


@pytest.mark.parametrize("K", [2, 5, 9, 40])
@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_text_is_readable(plot: Plot, K: int) -> None:
    """Labels do not overlap, legends do not cover data, and nothing is outside of the figure."""
    ax = plot(random_history(K, 60, rotation_lr=1e-3))
    figure = ax.figure
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    if ax.yaxis_inverted():
        assert all(upper.y0 > lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes)
    legend = ax.get_legend()
    assert (legend is None) == ax.yaxis_inverted()
    if legend is not None:
        assert legend.get_window_extent().x0 >= ax.get_window_extent().x1
        assert legend.get_window_extent().x1 <= figure.bbox.x1 + 1
        assert len({line.get_color() for line in legend.get_lines()}) == len(legend.get_lines())


def test_long_names_leave_room_for_the_map() -> None:
    ax = plot_cosines(random_history(4, 10, names=[f"{task} is a task whose name has no end" for task in range(4)]))
    ax.figure.canvas.draw()
    assert ax.get_window_extent().width > 0.35 * ax.figure.bbox.width
    assert row_labels(ax)[0].endswith("…")


def test_a_changing_rate_is_drawn_beside_the_angles() -> None:
    history, optimizer = History(), FakeOptimizer(["a", "b"])
    for step in range(5):
        history.record(optimizer.step(rotation_lr=0.5**step, angles=torch.ones(2)))
    ax = plot_rotations(history)
    (second,) = (other for other in ax.figure.axes if other is not ax)
    assert points(second.lines[0])[1] == [0.5**step for step in range(5)]
    ax.figure.canvas.draw()
    legend = ax.get_legend()
    assert legend is not None
    assert not legend.get_window_extent().overlaps(second.yaxis.label.get_window_extent())
    assert ax.get_title(loc="left") == "Rotations, learning rate 1 to 0.0625"
    constant = plot_rotations(random_history(2, 5, rotation_lr=0.25))
    assert len(constant.figure.axes) == 1
    assert constant.get_title(loc="left") == "Rotations, learning rate 0.25"


@pytest.mark.parametrize(("span", "scale"), [(1e3, "log"), (3.0, "linear"), (0.0, "linear"), (-1e3, "linear")])
def test_axis_is_logarithmic_if_values_span_decades(span: float, scale: str) -> None:
    for plot, field in FIELDS.items():
        if plot is not plot_rotations:
            fields: dict[str, Any] = {field: torch.tensor([1.0, span])}
            ax = plot(random_history(2, 10, **fields))
            assert ax.get_yscale() == scale


@pytest.mark.parametrize("K", [2, 5, 40])
@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_draws_on_the_given_axes_and_changes_no_settings(plot: Plot, K: int) -> None:
    settings = dict(matplotlib.rcParams)
    history = random_history(K, 10)
    _, (first, second) = plt.subplots(1, 2)
    assert plot(history, ax=second) is second
    assert not first.has_data()
    assert len(plt.get_fignums()) == 1
    assert plot(history) is not second
    assert len(plt.get_fignums()) == 2
    assert dict(matplotlib.rcParams) == settings


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for plot in (plot_history, plot_losses):
        with pytest.raises(ImportError, match=r"matplotlib must be installed.*pip install matplotlib"):
            plot(random_history(2, 1))


@pytest.mark.slow
def test_optional_packages_are_imported_only_when_needed() -> None:
    code = "import sys, rotoopt.diagnostics; assert not {'matplotlib', 'pandas', 'tensorboard'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("plot", [plot_history, *PLOTS], ids=lambda plot: plot.__name__)
def test_empty_history_is_an_error(plot: Plot) -> None:
    with pytest.raises(RuntimeError, match="must have records, got none"):
        plot(History())
    assert not plt.get_fignums()


@pytest.mark.parametrize("gap", [0.0, 0.2])
def test_lines_that_coincide_are_all_visible(gap: float) -> None:
    drawn = lines(plot_rotations(random_history(3, 60, total_angles=0.5 + gap * torch.arange(3)))).values()
    patterns = {str(line._dash_pattern) for line in drawn}  # type: ignore[attr-defined]
    assert len(patterns) == (1 if gap else 3)  # the first is solid, those above it have gaps
