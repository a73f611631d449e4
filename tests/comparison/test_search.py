"""The search is robust to metrics near zero and to learning rates that diverge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotoopt.comparison import compare
from rotoopt.comparison._search import choose_lr, yardstick

LOWER = torch.tensor([-1.0, -1.0])


def test_a_metric_near_zero_does_not_decide_the_choice() -> None:
    """A tenfold increase of a tiny error counts as much as 100 % of the other metric, and no more."""
    candidate = {0.1: torch.tensor([[1e-5, 0.01]]), 1.0: torch.tensor([[1.6e-6, 0.8]])}
    assert choose_lr(candidate, torch.tensor([1e-6, 1.0]), LOWER) == 0.1


@pytest.mark.parametrize("higher", [True, False])
def test_metrics_to_maximize_and_to_minimize_have_the_same_weight(higher: bool) -> None:
    """30 % better in one metric and 40 % worse in the other."""

    def train(seed: int, lr: float) -> dict[str, float]:
        change = 0.3 if higher else -0.4
        return {"up": 1.0 + (lr == 1.0) * change, "down": 1.0 + (lr == 1.0) * (0.4 if higher else -0.3)}

    result = compare(
        train,
        higher_is_better={"up": True, "down": False},
        candidates={"one": {}},
        baseline={"up": 1.0, "down": 1.0},
        seeds=1,
        lrs=[1.0, 0.1],
        quiet=True,
    )
    assert result.learning_rates == {"one": 0.1}


@given(st.integers(1, 4))
def test_a_learning_rate_without_failed_runs_is_preferred_to_a_slightly_better_one(seeds: int) -> None:
    good, better = torch.full((seeds, 2), 0.50), torch.full((seeds, 2), 0.49)
    better[-1] = torch.nan
    assert choose_lr({0.1: good, 1.0: better}, torch.ones(2), LOWER) == 0.1


@given(st.floats(1.0, 1e9) | st.just(torch.inf) | st.just(torch.nan))
def test_a_learning_rate_that_is_far_off_does_not_change_the_reference_of_others(bad: float) -> None:
    values = {0.1: torch.full((3, 2), 0.4), 0.2: torch.full((3, 2), 0.6), 0.3: torch.full((3, 2), 0.7)}
    expected = yardstick(values)
    assert expected.tolist() == pytest.approx([0.6, 0.6])
    moved = yardstick({**values, 0.3: torch.full((3, 2), bad)})
    assert 0.4 <= moved[0].item() <= 0.6 + 1e-6
    if bad < torch.inf:
        assert torch.equal(moved, expected)
