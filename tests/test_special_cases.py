"""Special cases of training, in which the method reduces to simpler ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

from rotoopt import EqualWeighting, GradNorm, ProgressWeighting, RotoGradOptimizer, RotoGradWeighting
from tests.asserts import assert_same_bits, eps, relative_error
from tests.samplers import DTYPES, LAYOUTS, SEEDS, Layout, Network, Sampler, batches, network

LAYOUT = st.sampled_from(LAYOUTS)
STEPS = 5
BARE: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": partial(Adam, lr=0.01),
    "RMSprop": partial(RMSprop, lr=0.01, centered=True),
}
WEIGHTINGS: list[Callable[[], Any]] = [
    ProgressWeighting,
    RotoGradWeighting,
    EqualWeighting,
    GradNorm,
    lambda: lambda J: J.sum(dim=0),
]


def train(
    model: Network, bare: Optimizer, data: list[tuple[Tensor, Tensor]], scales: Tensor, **options: Any
) -> RotoGradOptimizer:
    """Train with the wrapped optimizer, the losses scaled by ``scales``."""
    optimizer = RotoGradOptimizer(bare, list(model.heads), **options)
    for batch in data:
        losses, z = model.losses(batch)
        optimizer.zero_grad()
        optimizer.step([loss * scale for loss, scale in zip(losses, scales, strict=True)], z)
    return optimizer


def train_plainly(model: Network, bare: Optimizer, data: list[tuple[Tensor, Tensor]], scales: Tensor) -> None:
    """Train on the sum of the losses."""
    for batch in data:
        losses, _ = model.losses(batch)
        bare.zero_grad()
        terms = [loss * scale for loss, scale in zip(losses, scales, strict=True)]
        torch.autograd.backward(torch.stack(terms).sum())
        bare.step()


@pytest.mark.parametrize("name", BARE)
@given(layout=LAYOUT, seed=SEEDS, scale=st.floats(-3, 3), make=st.sampled_from(WEIGHTINGS), dtype=DTYPES)
def test_a_single_task_is_the_bare_optimizer_to_the_bit(
    name: str, layout: Layout, seed: int, scale: float, make: Callable[[], Any], dtype: torch.dtype
) -> None:
    shape, dim = layout
    data, scales = batches(seed, STEPS, 1, dtype), torch.tensor([10**scale], dtype=dtype)
    wrapped, plain = (network(seed, shape[1:], 1, dtype) for _ in range(2))
    train(wrapped, BARE[name](wrapped.parameters()), data, scales, dim=dim, weighting=make(), burn_in_period=2)
    train_plainly(plain, BARE[name](plain.parameters()), data, scales)
    for parameter, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert_same_bits(parameter.detach(), expected.detach())


@pytest.mark.parametrize("options", [{"rotation_lr": 0.0}, {"rotate": False}], ids=str)
@given(layout=LAYOUT, K=st.integers(1, 6), seed=SEEDS, dtype=DTYPES)
def test_no_rotations_and_equal_weights_are_the_plain_sum(
    options: dict[str, Any], layout: Layout, K: int, seed: int, dtype: torch.dtype
) -> None:
    shape, dim = layout
    data, scales = batches(seed, STEPS, K, dtype), Sampler(seed, dtype).uniform(K)
    wrapped, plain = (network(seed, shape[1:], K, dtype) for _ in range(2))
    bare = partial(SGD, lr=0.02, momentum=0.9)
    train(wrapped, bare(wrapped.parameters()), data, scales, dim=dim, weighting=EqualWeighting(), **options)
    train_plainly(plain, bare(plain.parameters()), data, scales)
    # The gradients are added in another order. Largest error in 600 runs: 1.4 eps.
    for parameter, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert relative_error(parameter.detach(), expected.detach()) <= 20 * eps(dtype)


@given(layout=LAYOUT, K=st.integers(2, 6), seed=SEEDS, make=st.sampled_from(WEIGHTINGS[:3]))
def test_order_of_the_tasks_does_not_matter(layout: Layout, K: int, seed: int, make: Callable[[], Any]) -> None:
    (shape, dim), sampler = layout, Sampler(seed)
    data, scales = batches(seed, STEPS, K, torch.float64), sampler.uniform(K)
    order = torch.randperm(K, generator=sampler.generator)
    one, other = (network(seed, shape[1:], K, torch.float64) for _ in range(2))
    other.heads = torch.nn.ModuleList([other.heads[int(task)] for task in order])
    options: dict[str, Any] = {"dim": dim, "rotation_lr": 0.05, "burn_in_period": 2}
    first = train(one, SGD(one.parameters(), lr=0.02), data, scales, weighting=make(), **options)
    permuted = [(x, targets[order]) for x, targets in data]
    second = train(other, SGD(other.parameters(), lr=0.02), permuted, scales[order], weighting=make(), **options)

    bound = 1e-11  # sums over tasks in another order, over some steps of training
    assert relative_error(second.rotations.matrices, first.rotations.matrices[order]) <= bound
    assert relative_error(second.task_weights, first.task_weights[order]) <= bound
    for parameter, expected in zip(other.backbone.parameters(), one.backbone.parameters(), strict=True):
        assert relative_error(parameter.detach(), expected.detach()) <= bound
    for parameter, expected in zip(other.heads[0].parameters(), one.heads[int(order[0])].parameters(), strict=True):
        assert relative_error(parameter.detach(), expected.detach()) <= bound


@given(layout=LAYOUT, K=st.integers(2, 6), seed=SEEDS, power=st.integers(-20, 20), dtype=DTYPES)
def test_common_scale_of_the_losses_does_not_change_the_rotations(
    layout: Layout, K: int, seed: int, power: int, dtype: torch.dtype
) -> None:
    (shape, dim), data, results = layout, batches(seed, STEPS, K, dtype), []
    for scale in (1.0, 2.0**power):  # as a GradScaler would; no bit of a gradient changes
        model = network(seed, shape[1:], K, dtype)
        bare = SGD(model.parameters(), lr=0.02 / scale)
        scales = torch.full((K,), scale, dtype=dtype)
        results.append(train(model, bare, data, scales, dim=dim, rotation_lr=0.05).rotations.matrices)
    assert torch.equal(*results)
