"""The strategies have the documented properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rotoopt import RotoGradOptimizer
from rotoopt.testing import check_invariants, strategies
from rotoopt.testing._models import Batch, Network
from rotoopt.testing._sampler import Sampler
from tests.asserts import assert_rotations

Dims = int | tuple[int, ...]


def cosines(grads: Tensor) -> Tensor:
    units = grads.double().flatten(1)
    products: Tensor = units @ units.mT
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms)


def pairs(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


@pytest.mark.parametrize(("conflicting", "low", "high"), [(True, -1.0, 0.0), (False, -1e-6, 1.0), (None, -1.0, 1.0)])
@given(data=st.data())
def test_gradients_conflict_as_asked(conflicting: bool | None, low: float, high: float, data: st.DataObject) -> None:
    grads = data.draw(strategies.task_gradients(conflicting=conflicting))
    found = pairs(cosines(grads))
    assert found.min() >= low - 1e-6
    assert found.max() <= high + 1e-6
    assert found.std() <= 1e-5 or len(found) == 1


@given(grads=strategies.task_gradients(low_rank=True, max_log_scale=0.0), seed=st.integers(0, 99))
def test_ranks_are_low_as_asked(grads: Tensor, seed: int) -> None:
    unmixed = Sampler(seed).task_gradients(3, 4, 6, rank=1)
    values = torch.linalg.svdvals(unmixed)
    assert (values[:, 1] <= 1e-10).all()
    assert torch.linalg.matrix_rank(grads.double(), rtol=1e-4).max() <= len(grads)


@given(grads=strategies.task_gradients(st.integers(2, 5), max_log_scale=6.0))
def test_norms_span_the_scales(grads: Tensor) -> None:
    norms = grads.double().flatten(1).norm(dim=1)
    assert norms.max() / norms.min() == pytest.approx(1e12, rel=1e-3)


@given(matrices=strategies.rotations())
def test_rotations_are_rotations(matrices: Tensor) -> None:
    assert_rotations(matrices)


@given(drawn=strategies.representations())
def test_representations_fit_their_dimensions(drawn: tuple[Tensor, Dims]) -> None:
    rep, dim = drawn
    assert rep.requires_grad
    assert max((dim,) if isinstance(dim, int) else dim) < rep.ndim


@given(drawn=strategies.multi_task_models())
def test_models_have_the_invariants(drawn: tuple[Network, list[Batch], Dims]) -> None:
    model, drawn_batches, dim = drawn
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = RotoGradOptimizer(bare, heads=model.heads, dim=dim, init="haar")
    for batch in drawn_batches[1:]:
        optimizer.zero_grad()
        optimizer.step(*model.losses(batch))
    check_invariants(optimizer, lambda: model.losses(drawn_batches[0])[0])
