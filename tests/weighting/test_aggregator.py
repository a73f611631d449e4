"""Aggregators: those of TorchJD, and any function of the task gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchjd.aggregation
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rotoopt.weighting._aggregator import as_weighting
from tests.samplers import DTYPES, LAYOUTS, NUM_TASKS, SEEDS, Bench, Layout, Sampler

LAYOUT = st.sampled_from(LAYOUTS)
AGGREGATORS = ["UPGrad", "IMTLG", "AlignedMTL", "PCGrad", "ConFIG", "MGDA", "Mean"]


@pytest.mark.parametrize("name", AGGREGATORS)
@given(K=NUM_TASKS, layout=LAYOUT, seed=SEEDS, dtype=DTYPES, absent=st.none() | st.integers(0, 9))
def test_torchjd_aggregator_gets_the_gradients_of_the_present_tasks(
    name: str, K: int, layout: Layout, seed: int, dtype: torch.dtype, absent: int | None
) -> None:
    shape, dim = layout
    aggregator: Callable[[Tensor], Tensor] = getattr(torchjd.aggregation, name)()
    bench, grads = Bench(shape, K, dtype, dim=dim, weighting=aggregator), Sampler(seed, dtype).normal(K, *shape)
    kept = [task for task in range(K) if task != absent]
    torch.manual_seed(seed)  # PCGrad visits the tasks in random order
    received = bench.step([grads[task] if task in kept else None for task in range(K)])
    torch.manual_seed(seed)
    assert torch.equal(received, aggregator(grads[kept].flatten(1)).view(shape))


@given(K=NUM_TASKS, seed=SEEDS)
def test_weights_of_a_callable_are_unknown(K: int, seed: int) -> None:
    bench = Bench((4, 6), K, torch.float32, weighting=lambda J: J.sum(dim=0))
    bench.step(list(Sampler(seed, torch.float32).normal(K, 4, 6)))
    assert bench.record.weights.isnan().all()


@pytest.mark.parametrize(
    ("weighting", "found"),
    [
        (lambda J: J, r"\(2, 24\)"),
        (lambda J: J.sum(), r"\(\)"),
        (lambda J: None, "NoneType"),
        (lambda J: [1.0], "list"),
    ],
)
def test_callable_that_returns_something_else_is_an_error(weighting: Callable[[Tensor], Any], found: str) -> None:
    bench = Bench((4, 6), 2, torch.float32, weighting=weighting)
    message = rf"^`weighting` must map a \(K, n\) tensor to an \(n,\) tensor, got {found} for \(2, 24\)\.$"
    with pytest.raises(ValueError, match=message):
        bench.step(list(Sampler(0, torch.float32).normal(2, 4, 6)))


def test_repr_of_a_callable() -> None:
    aggregator = torchjd.aggregation.Mean()
    assert repr(as_weighting(aggregator)) == repr(aggregator)
