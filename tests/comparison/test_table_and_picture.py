"""The table and the picture show the numbers of the comparison."""

from __future__ import annotations

import re
from typing import Any, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from rotoopt.comparison import Comparison
from rotoopt.comparison._table import plus_minus
from rotoopt.diagnostics._drawing import COLORS
from tests.comparison.compared import compared

mpl.use("Agg")


def made(plain: list[float], default: list[float]) -> Comparison:
    metrics = {"plain sum": {"error": torch.tensor(plain)}, "default": {"error": torch.tensor(default)}}
    return Comparison(metrics, {"error": False}, tuple(range(len(plain))), "plain sum")


@given(st.integers(-90_000, 90_000), st.integers(0, 90_000), st.integers(-12, 0))
def test_a_cell_has_the_numbers_to_about_three_digits_of_the_larger_one(whole: int, part: int, scale: int) -> None:
    mean, half = whole * 10.0**scale, part * 10.0**scale
    text = plus_minus(torch.tensor([mean - half, mean + half], dtype=torch.float64))
    written = [float(each) for each in text.split(" ± ")]
    rounding = 0.006 * max(abs(mean), half)
    assert len(text) <= 21
    assert written == pytest.approx([mean, half], rel=1e-6, abs=rounding if "e" in text else max(rounding, 0.00051))


def test_clipped_changes_are_shown_only_if_clipping_has_an_effect() -> None:
    assert "clipped" not in str(made([1.0, 2.0], [0.5, 1.0]))
    assert "clipped" in str(made([0.1, 0.1], [1.0, 1.0]))


def test_a_table_of_one_seed_has_no_errors_and_one_of_no_runs_no_numbers() -> None:
    text = str(made([1.0], [0.5]))
    assert "| default   |   0.500 |      +50.0 |" in text
    assert "1 seed." in text
    assert "2 seeds." in str(made([1.0, 2.0], [0.5, 1.0]))
    diverged = str(made([1.0, 1.0], [torch.nan, torch.nan])).splitlines()[3]
    assert [each.strip() for each in diverged.split("|")] == ["", "default", "-", "-", "-100.0 ± 0.0", ""]


def test_columns_are_aligned() -> None:
    for result in (compared(), compared(lrs=[0.1, 1.0]), made([0.0, 0.0], [1.0, 1.0])):
        rows = [line for line in str(result).splitlines() if line.startswith("|")]
        assert len({tuple(at for at, each in enumerate(line) if each == "|") for line in rows}) == 1


WHOLE = """\
| candidate | accuracy ↑ | error ↓ | Delta-m, % | clipped, % | lr | ms per step |
|---|---:|---:|---:|---:|---:|---:|
| plain sum | 0.600 ± 0.041 | 0.020 ± 0.004 | 0 | 0 | 0.001 | 12.0 |
| default | 0.750 ± 0.050 (2 of 4) | 0.040 ± 0.012 (3 of 4) | -75.0 ± 50.0 (2 of 4) | -50.0 ± 17.7 | 0.25 | |
| mine | 0.700 ± 0.058 (3 of 4) | 0.020 ± 0.000 (3 of 4) | +5.6 ± 15.5 (3 of 4) | +5.6 ± 15.5 (3 of 4) | | 9.0 |

Mean ± standard error, 4 seeds.
Delta-m: mean change of the metrics relative to plain sum, paired by seed; positive is better.
Clipped: changes are limited to 100 %; a run that diverged counts as -100 %.
default diverged with seed 1, 7.
mine failed with seed 0: ValueError: no"""


def test_a_whole_table() -> None:
    nan = torch.nan
    numbers = {
        "plain sum": ([0.5, 0.6, 0.7, 0.6], [0.02, 0.03, 0.01, 0.02], [10.0, 12.0, 30.0, nan]),
        "default": ([0.8, nan, 0.7, nan], [0.04, 0.02, 0.06, nan], [nan] * 4),
        "mine": ([nan, 0.6, 0.7, 0.8], [nan, 0.02, 0.02, 0.02], [nan, 9.0, 9.0, 9.0]),
    }
    result = Comparison(
        {
            name: {"accuracy": torch.tensor(accuracy).double(), "error": torch.tensor(error).double()}
            for name, (accuracy, error, _) in numbers.items()
        },
        {"accuracy": True, "error": False},
        (0, 1, 2, 7),
        "plain sum",
        ms_per_step={name: torch.tensor(times) for name, (_, _, times) in numbers.items()},
        learning_rates={"plain sum": 0.001, "default": 0.25},
        failures={("mine", 0): "ValueError: no\nplease"},
    )
    assert re.sub(" {2,}", " ", re.sub("-{3,}", "---", str(result))) == WHOLE


def test_where_the_number_of_digits_changes() -> None:
    numbers = torch.tensor([10.0, 1.0, 0.01, 0.001, 0.0001, 0.0], dtype=torch.float64)
    texts = ["10.0", "1.00", "0.010", "0.00100", "1.00e-04", "0.000"]
    assert [plus_minus(each) for each in numbers[:, None]] == texts


@pytest.mark.parametrize("default", [[0.5, 0.7], [0.5, torch.nan], [torch.nan, torch.nan]])
def test_the_picture_shows_the_means_and_is_visible_on_any_page(default: list[float]) -> None:
    result = made([1.0, 2.0], default)
    figure = result.plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Delta-m", "error"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["default", "plain sum"]
    assert figure.axes[0].get_ylim() == (-0.5, 1.5)
    assert figure.get_supxlabel() == "change against plain sum, % (clipped to 100; right is better)"
    colors: list[set[str]] = [set(), set()]
    for line in figure.axes[0].lines[1:]:  # behind that of zero
        (row,) = set(cast(Any, line.get_ydata()))
        colors[row].add(mpl.colors.to_hex(line.get_color()))
    assert colors == [{COLORS[1]}, {COLORS[0]}]
    expected = result.delta_m("default", clipped=True).mean().item()
    drawn = [[float(x) for x in cast(Any, line.get_xdata())] for line in figure.axes[0].lines]
    assert any(len(places) == 1 and abs(places[0] - expected) < 1e-6 for places in drawn)
    assert figure.patch.get_alpha() == 0
    texts = [to_rgb(label.get_color()) for axes in figure.axes for label in axes.get_xticklabels()]
    assert all(0.175 < luminance(text) < 0.22 for text in texts)  # 4 to 1 or more against white and against black
    plt.close(figure)


def luminance(color: tuple[float, float, float]) -> float:
    red, green, blue = (((channel + 0.055) / 1.055) ** 2.4 for channel in color)
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)
