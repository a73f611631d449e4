"""Changes relative to a baseline: their invariances, and robustness to single bad numbers."""

from __future__ import annotations

from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rotoopt.comparison._statistics import LIMIT, clip, mean_and_error, relative_changes
from rotoopt.diagnostics import mean_relative_change

NUM_METRICS = 3


@st.composite
def runs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Metrics of a candidate and of its baseline, ``(seeds, 3)``, and the signs, ``(3,)``."""
    seeds = draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    signs = torch.tensor(draw(st.lists(st.sampled_from([1.0, -1.0]), min_size=NUM_METRICS, max_size=NUM_METRICS)))
    values, reference = torch.rand(2, seeds, NUM_METRICS, dtype=torch.float64) + 0.1
    return values, reference, signs


@given(runs(), st.lists(st.floats(1e-6, 1e6), min_size=NUM_METRICS, max_size=NUM_METRICS))
def test_the_unit_of_a_metric_changes_nothing(drawn: tuple[Tensor, Tensor, Tensor], units: list[float]) -> None:
    values, reference, signs = drawn
    unit = torch.tensor(units, dtype=torch.float64)
    torch.testing.assert_close(
        relative_changes(values * unit, reference * unit, signs), relative_changes(values, reference, signs)
    )


@given(runs())
def test_a_metric_and_its_negative_are_equivalent(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    values, reference, signs = drawn
    torch.testing.assert_close(
        relative_changes(-values, -reference, -signs), relative_changes(values, reference, signs)
    )


@given(runs(), st.randoms(use_true_random=False))
def test_the_order_of_seeds_changes_nothing(drawn: tuple[Tensor, Tensor, Tensor], random: Random) -> None:
    values, reference, signs = drawn
    order = list(range(len(values)))
    random.shuffle(order)
    torch.testing.assert_close(
        relative_changes(values[order], reference[order], signs), relative_changes(values, reference, signs)[order]
    )


@given(runs())
def test_differences_between_seeds_cancel(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    """Changes are paired by seed: an offset of a seed that is common to all has no effect."""
    values, reference, signs = drawn
    harder = torch.randn(len(values), 1, dtype=torch.float64)
    harder -= harder.mean()  # the mean of the reference, the unit, stays
    torch.testing.assert_close(
        relative_changes(values + harder, reference + harder, signs), relative_changes(values, reference, signs)
    )


@given(runs())
def test_change_of_one_seed_is_that_of_the_literature(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    values, reference, signs = (tensor[:1] if tensor.dim() > 1 else tensor for tensor in drawn)
    expected = mean_relative_change(values[0], reference[0], [sign > 0 for sign in signs.tolist()])
    torch.testing.assert_close(relative_changes(values, reference, signs).mean().item(), expected)


@given(runs(), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.booleans())
def test_a_run_that_diverged_affects_its_own_number_only(
    drawn: tuple[Tensor, Tensor, Tensor], bad: float, of_reference: bool
) -> None:
    values, reference, signs = drawn
    values, reference = torch.cat([values, values[:1]]), torch.cat([reference, reference[:1]])
    without = relative_changes(values[:-1], reference[:-1], signs)
    (reference if of_reference else values)[-1, 0] = bad
    changes = relative_changes(values, reference, signs)
    assert changes[-1, 0].isnan()
    assert changes[-1, 1:].isfinite().all()
    if of_reference:
        torch.testing.assert_close(changes[:-1, 0], without[:, 0])


def test_a_metric_that_is_zero_in_the_baseline() -> None:
    changes = relative_changes(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), torch.tensor([-1.0, -1.0]))
    assert changes.tolist() == [[0.0, -torch.inf]]
    assert clip(changes).tolist() == [[0.0, -LIMIT]]


@given(runs())
def test_clipped_changes_are_bounded_and_keep_small_ones(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    changes = relative_changes(*drawn)
    clipped = clip(changes)
    assert (clipped.abs() <= LIMIT).all()
    small = changes.abs() <= LIMIT
    assert torch.equal(clipped[small], changes[small])
    assert clip(torch.tensor([torch.nan])).item() == -LIMIT


def test_the_error_of_a_mean_is_that_of_what_is_finite() -> None:
    torch.manual_seed(0)
    values = torch.randn(2000, 4, dtype=torch.float64)
    means = torch.tensor([mean_and_error(row)[0] for row in values])
    errors = torch.tensor([mean_and_error(row)[1] ** 2 for row in values]).mean().sqrt()
    torch.testing.assert_close(errors, means.std(), rtol=0.05, atol=0.0)  # 2000 means: 1.6 %
    with_nan = torch.cat([values[0], torch.tensor([torch.nan])])
    assert mean_and_error(with_nan) == mean_and_error(values[0])
