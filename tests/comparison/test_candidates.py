"""Candidates: the plain sum is exact, options are created for each run, and descriptions identify them."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotoopt import EqualWeighting, GradNorm, ProgressWeighting, RotoGradOptimizer, RotoGradWeighting
from rotoopt.comparison import CANDIDATES
from rotoopt.comparison._candidates import describe
from tests.comparison.trainings import make_losses, make_network


def weights_after_training(
    seed: int, num_tasks: int, step: Callable[..., None], wrap: Callable[..., Any]
) -> torch.Tensor:
    torch.manual_seed(seed)
    backbone, heads = make_network(num_tasks)
    adam = torch.optim.Adam([*backbone.parameters(), *heads.parameters()], lr=0.01)
    optimizer = wrap(adam, heads)
    for _ in range(5):
        losses = make_losses(backbone, heads)
        optimizer.zero_grad()
        step(optimizer, losses)
    return torch.cat([param.detach().flatten() for param in (*backbone.parameters(), *heads.parameters())])


def on_the_sum(optimizer: torch.optim.Optimizer, losses: list[torch.Tensor]) -> None:
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@given(st.integers(0, 2**20), st.integers(1, 4))
def test_plain_sum_trains_as_the_sum_of_the_losses(seed: int, num_tasks: int) -> None:
    """Bit for bit with up to two tasks; with more, the gradients are added in another order."""
    plain = weights_after_training(seed, num_tasks, on_the_sum, lambda adam, heads: adam)
    ours = weights_after_training(
        seed,
        num_tasks,
        lambda optimizer, losses: optimizer.step(losses),
        lambda adam, heads: RotoGradOptimizer(adam, heads, **CANDIDATES["plain sum"]),
    )
    if num_tasks <= 2:
        assert torch.equal(plain, ours)
    else:
        torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-5)  # Adam divides rounding errors by small moments


def test_candidates_are_created_anew_at_each_access() -> None:
    for name in CANDIDATES:
        for _ in range(2):  # an optimizer rejects a weighting that belongs to another one
            backbone, heads = make_network()
            RotoGradOptimizer(torch.optim.SGD(backbone.parameters(), lr=0.1), heads, **CANDIDATES[name])


def test_repr_shows_the_options_of_candidates() -> None:
    assert repr(CANDIDATES) == repr(dict(CANDIDATES))


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"rotate": False},
    {"rotate": [True, False]},
    {"weighting": EqualWeighting()},
    {"weighting": RotoGradWeighting()},
    {"weighting": ProgressWeighting()},
    {"weighting": ProgressWeighting(alpha=0.0)},
    {"weighting": ProgressWeighting(decay=0.0)},
    {"weighting": GradNorm()},
    {"weighting": GradNorm(lr=0.1)},
    {"weighting": torch.nn.Linear(1, 1)},
    {"weighting": torch.sum},
    {"weighting": make_losses},
    {"weighting": functools.partial(torch.sum, dim=0)},
    {"weighting": functools.partial(torch.sum, dim=1)},
    {"weighting": functools.partial(torch.mean, dim=0)},
    {"weighting": object()},
)


def test_a_description_equals_that_of_a_copy_only() -> None:
    descriptions = [describe(options) for options in OPTIONS]
    assert descriptions == [describe(copy.deepcopy(options)) for options in OPTIONS]
    assert descriptions == [describe(pickle.loads(pickle.dumps(options))) for options in OPTIONS]
    assert len(set(descriptions)) == len(OPTIONS)
    assert not any("0x" in each for each in descriptions)


def test_a_whole_description() -> None:
    """Files contain it: in another form, all runs would be repeated."""
    function: Any = make_losses
    options = {
        "b": [1, (2.5, "x"), object()],
        "a": functools.partial(function, 1, k=torch.ones(2)),
        "c": SimpleNamespace(y=1, x=EqualWeighting()),
    }
    of_a = "partial([tests.comparison.trainings.make_losses, [1], {'k': tensor([1.0, 1.0])}])"
    of_b, of_c = "[1, [2.5, 'x'], <object object>]", "SimpleNamespace(x=EqualWeighting(), y=1)"
    assert describe(options) == f"{{'a': {of_a}, 'b': {of_b}, 'c': {of_c}}}"


def test_a_description_of_a_recursive_object_terminates() -> None:
    weighting = EqualWeighting()
    weighting.friend = weighting  # type: ignore[attr-defined]
    assert describe(weighting) == "EqualWeighting(friend=...)"


def test_torchjd_aggregators_are_described_with_their_options() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    assert describe(aggregation.FairGrad(alpha=1.0)) != describe(aggregation.FairGrad(alpha=2.0))
    assert describe(aggregation.UPGrad()) == describe(aggregation.UPGrad())
