"""Separate loaders for each task, stacked losses, heads that change their input in place, several optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import ProgressWeighting, RotoGradOptimizer, RotoGradWeighting
from rotoopt.testing._branching import BRANCHING
from rotoopt.weighting import Weighting
from tests.asserts import assert_rotations
from tests.branching.twins import NAMES, WAYS, Make, Twins
from tests.contract.models import assert_same
from tests.samplers import SEEDS

MODELS = pytest.mark.parametrize("make", BRANCHING, ids=NAMES)


@MODELS
def test_stacked_losses_are_the_losses(make: Make) -> None:
    results = []
    for stack in (torch.stack, list):
        twins = Twins.of(make, 0)
        for step in range(3):
            twins.optimizer.zero_grad()
            losses = list(twins.losses(twins.batch(step), step).values())
            twins.optimizer.step(stack(losses))
        results.append(twins.wrapped.modules().state_dict())
    assert_same(*results)


def two_tasks(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, nn.Module]]:
    backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh()).to(dtype)
    return backbone, {name: nn.Linear(8, 2).to(dtype) for name in ("often", "seldom")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("zipped", [False, True], ids=["in turn", "one step for both"])
@given(seed=SEEDS, log_scale=st.floats(-3, 3))
def test_loaders_of_two_lengths(way: str, zipped: bool, seed: int, log_scale: float) -> None:
    """Each batch runs one head. The smaller gradient gets the larger weight, with or without the other one."""
    torch.manual_seed(seed)
    backbone, heads = two_tasks()
    params = [param for module in (backbone, *heads.values()) for param in module.parameters()]
    optimizer = RotoGradOptimizer(SGD(params, lr=0.0), heads, weighting=RotoGradWeighting())
    scales = {"often": 1.0, "seldom": 10.0**log_scale}
    loaders = {"often": torch.randn(6, 4, 5).double(), "seldom": torch.randn(2, 3, 5).double()}
    batches = itertools.chain(*itertools.zip_longest(*([(name, x) for x in loaders[name]] for name in loaders)))
    norms: dict[str, Tensor] = {}
    for number, (name, x) in enumerate(filter(None, batches)):
        WAYS[way](optimizer, {name: (heads[name](backbone(x)) - 1).square().mean() * scales[name]})
        record = optimizer.last_step
        assert record is not None
        task = list(heads).index(name)
        norms[name] = record.grad_norms[task]
        alone = torch.stack(list(norms.values()))
        common = record.weights[task] * norms[name]
        assert alone.min() * (1 - 1e-9) <= common <= alone.max() * (1 + 1e-9)
        if not zipped or number % 2:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [ProgressWeighting, RotoGradWeighting], ids=lambda make: make.__name__)
@given(seed=SEEDS, empty=st.sets(st.integers(0, 17)), length=st.sampled_from([None, 0, 3]))
def test_empty_batches(way: str, make: Callable[[], Weighting], seed: int, empty: set[int], length: int | None) -> None:
    """Also in steps that update the rotations: present gradients are weighted, and nothing else changes."""
    torch.manual_seed(seed)
    backbone, heads = two_tasks()
    params = [param for module in (backbone, *heads.values()) for param in module.parameters()]
    optimizer = RotoGradOptimizer(SGD(params, lr=0.01), heads, weighting=make())
    for number in range(18):
        batch = 0 if number in empty and length != 0 else 4
        shape = (batch, 5) if length is None else (batch, 0 if number in empty else 3, 5)
        x = torch.randn(shape).double()

        def losses(x: Tensor) -> dict[str, Tensor]:
            z = backbone(x)
            return {name: (k + 1) * (head(z) - 1).square().sum() for k, (name, head) in enumerate(heads.items())}

        with optimizer.paused():
            true = [torch.autograd.grad(losses(x)[name], backbone[0].weight)[0] for name in heads]  # type: ignore[index]
        optimizer.zero_grad()
        WAYS[way](optimizer, losses(x))
        weighted = sum(weight * grad for weight, grad in zip(optimizer.task_weights, true, strict=True))
        assert_close(backbone[0].weight.grad, weighted)  # type: ignore[index]
        optimizer.step()
    assert_rotations(optimizer.rotations.matrices)


def of_z(change: Callable[[Tensor], Tensor]) -> nn.Module:
    class Changes(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return change(z)

    return Changes()


@pytest.mark.parametrize("way", WAYS)
@given(seed=SEEDS, log_scale=st.floats(-3, 3))
def test_a_batch_of_one_task_may_read_its_part_of_joined_outputs(way: str, seed: int, log_scale: float) -> None:
    """The gradient of the other outputs is zero, and their task absent: joining them changes nothing."""
    results = []
    for joins in (False, True):
        torch.manual_seed(seed)
        backbone, heads = two_tasks()
        params = [param for module in (backbone, *heads.values()) for param in module.parameters()]
        optimizer, weights = RotoGradOptimizer(SGD(params, lr=1e-3), heads, turn_every=2), []
        for name, scale in [("often", 1.0), ("often", 1.0), ("seldom", 10.0**log_scale)] * 3:
            z = backbone(torch.randn(4, 5).double())
            outs = {task: head(z) for task, head in heads.items()}
            if joins:
                outs = dict(zip(heads, torch.stack(list(outs.values())).unbind(), strict=True))
            optimizer.zero_grad()
            WAYS[way](optimizer, {name: (outs[name] - 1).square().mean() * scale})
            optimizer.step()
            record = optimizer.last_step
            assert record is not None
            assert record.present.tolist() == [task == name for task in heads]
            assert record.finite
            weights.append(record.weights)
        results.append(torch.stack(weights))
    assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rotate", [False, True])
def test_heads_that_begin_in_place_get_their_own_copy_of_z(rotate: bool) -> None:
    """So that no head gets the modified z of another one, in training and evaluation."""
    results = []
    for in_place in (False, True):
        torch.manual_seed(0)
        backbone, linear = nn.Linear(5, 8), [nn.Linear(8, 2) for _ in range(3)]
        heads = [
            nn.Sequential(nn.ReLU(inplace=in_place), linear[0]),
            nn.Sequential(of_z(lambda z, add=in_place: z.add_(1.0) if add else z + 1.0), linear[1]),  # type: ignore[misc]
            linear[2],
        ]
        bare = SGD([param for module in (backbone, *linear) for param in module.parameters()], lr=0.1)
        optimizer = RotoGradOptimizer(bare, heads, rotate=rotate)
        outputs = []
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            z = backbone(torch.randn(4, 5, generator=generator))
            with torch.no_grad():
                outputs += [head.eval()(z) for head in heads]
            optimizer.zero_grad()
            optimizer.step([head.train()(z).square().mean() for head in heads])
        results.append([outputs, [param.detach() for param in linear[0].parameters()]])
    assert_close(results[1], results[0])


def test_heads_may_have_their_own_optimizers() -> None:
    torch.manual_seed(0)
    backbone, heads = two_tasks()
    optimizer = RotoGradOptimizer(SGD(backbone.parameters(), lr=0.1), heads)
    others = [SGD(head.parameters(), lr=0.1) for head in heads.values()]
    before = [param.detach().clone() for head in heads.values() for param in head.parameters()]
    for _ in range(20):
        for each in (optimizer, *others):
            each.zero_grad()
        z = backbone(torch.randn(4, 5).double())
        optimizer.step({name: (head(z) - 1).square().mean() for name, head in heads.items()}, z)
        for each in others:
            each.step()
    after = [param for head in heads.values() for param in head.parameters()]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
