"""Taps: if the weights are known before the backward pass, gradients are weighted immediately, with equal results."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import EqualWeighting, GradNorm, ProgressWeighting, RotoGradOptimizer, RotoGradWeighting, Weighting
from rotoopt.weighting import Measurements
from tests.asserts import eps
from tests.samplers import DTYPES, LAYOUTS, NUM_TASKS, SEEDS, Bench, Lagged, Layout, Sampler, batches, network

LAYOUT = st.sampled_from(LAYOUTS)
NEVER = 10**9  # but in the first step
STEPS = 4


MAKE: Any = st.sampled_from([EqualWeighting, Lagged, lambda: GradNorm(common_norm="mean_of_norms", lr=0.1)])


def grads_of(sampler: Sampler, K: int, shape: tuple[int, ...]) -> Tensor:
    return sampler.normal(K, *shape) * sampler.log_scales(K, -2, 2).view(K, *[1] * len(shape))


@given(K=NUM_TASKS, layout=LAYOUT, seed=SEEDS, dtype=DTYPES, make=MAKE, data=st.data())
def test_both_ways_give_the_same(
    K: int, layout: Layout, seed: int, dtype: torch.dtype, make: Any, data: st.DataObject
) -> None:
    (shape, dim), sampler = layout, Sampler(seed, dtype)
    options: dict[str, Any] = {"dim": dim, "init": "haar", "rotation_size": None, "rotation_lr": 0.0}
    benches = []
    for turn_every in (1, NEVER):
        torch.manual_seed(seed)
        benches.append(Bench(shape, K, dtype, weighting=make(), turn_every=turn_every, **options))
    for _ in range(STEPS):
        absent = data.draw(st.sets(st.integers(0, K - 1), max_size=K - 1))
        grads, values = grads_of(sampler, K, shape), sampler.uniform(K).tolist()
        batch = [None if task in absent else grad for task, grad in enumerate(grads)]
        torch.manual_seed(seed)  # Haar rotations are drawn in the first step
        waited = benches[0].step(batch, values)
        torch.manual_seed(seed)
        passed = benches[1].step(batch, values)
        scale = float(waited.abs().max())
        assert_close(passed, waited, rtol=0, atol=50 * K * eps(dtype) * scale)
        for name in ("grad_norms", "weights", "present", "finite", "losses"):
            expected, found = (getattr(bench.record, name) for bench in benches)
            assert_close(found, expected, rtol=100 * eps(dtype), atol=0, equal_nan=True, msg=name)


@given(K=NUM_TASKS, layout=LAYOUT, seed=SEEDS, make=MAKE)
def test_backbone_gets_the_sum_of_the_gradients_times_the_weights_that_are_recorded(
    K: int, layout: Layout, seed: int, make: Any
) -> None:
    (shape, dim), sampler = layout, Sampler(seed)
    bench = Bench(shape, K, torch.float64, dim=dim, weighting=make(), turn_every=NEVER, rotate=False)
    for _ in range(STEPS):
        grads = grads_of(sampler, K, shape)
        received = bench.step(list(grads), sampler.uniform(K).tolist())
        weights = bench.record.weights.view(K, *[1] * len(shape))
        expected = (weights * grads).sum(dim=0)
        assert_close(received, expected, rtol=1e-12, atol=1e-13 * float((weights * grads).abs().max()))


@given(K=NUM_TASKS, seed=SEEDS)
def test_weights_are_computed_from_the_previous_step(K: int, seed: int) -> None:
    sampler = Sampler(seed)
    lagged, exact = (
        Bench((4, 6), K, torch.float64, weighting=w, rotate=False) for w in (Lagged(), RotoGradWeighting())
    )
    weights = torch.ones(K).double()
    for _ in range(STEPS):
        grads = list(grads_of(sampler, K, (4, 6)))
        lagged.step(grads)
        exact.step(grads)
        assert_close(lagged.record.weights, weights, rtol=1e-12, atol=0)
        weights = exact.record.weights


@given(K=NUM_TASKS, seed=SEEDS, passes=st.integers(2, 4), turn_every=st.sampled_from([1, NEVER]))
def test_passes_of_a_step_have_the_same_weights_and_the_statistics_of_one_pass(
    K: int, seed: int, passes: int, turn_every: int
) -> None:
    """The squared norm over all samples is the sum over the parts. Losses are divided, as usual."""
    results = []
    for parts in (1, passes):
        sampler = Sampler(seed)
        bench = Bench((4, 6), K, torch.float64, weighting=Lagged(), turn_every=turn_every, rotate=False)
        bench.step(list(grads_of(sampler, K, (4, 6))))
        for _ in range(2):
            whole, values = grads_of(sampler, K, (12, 6)), sampler.uniform(K)
            used = []
            for part in whole.view(K, parts, -1, 6).unbind(1):
                bench.shape = tuple(part.shape[1:])
                bench.backward(list(part), (values / parts).tolist())
                used.append(bench.record.weights)
            bench.optimizer.step()
            assert all(torch.equal(weights, used[0]) for weights in used)
            results.append((bench.record.grad_norms, bench.record.losses, bench.optimizer._core.engine.memory.weights))
    for one, several in zip(results[:2], results[2:], strict=True):
        assert_close(several, one, rtol=1e-12, atol=0)


@given(K=NUM_TASKS, seed=SEEDS, data=st.data())
def test_a_pass_per_task_is_one_pass_with_all(K: int, seed: int, data: st.DataObject) -> None:
    """Also in the user's own backward, and in any order, because the weights are known beforehand."""
    results = []
    for apart in (False, True):
        sampler, torch_seed = Sampler(seed), seed % 1000
        model = network(torch_seed, (6,), K, torch.float64)
        bare = SGD(model.parameters(), lr=0.01)
        optimizer = RotoGradOptimizer(bare, list(model.heads), weighting=Lagged(), turn_every=NEVER)
        for t, batch in enumerate(batches(seed, STEPS, K, torch.float64)):
            optimizer.zero_grad()
            losses, _ = model.losses(batch)
            losses = [loss * 10.0 ** -(task % 4) for task, loss in enumerate(losses)]
            if apart and t > 0:  # in the first step, rotations and cosines are measured
                order = torch.randperm(K, generator=sampler.generator).tolist()
                for task in order:
                    torch.autograd.backward(losses[task], retain_graph=True)
            else:
                torch.autograd.backward(losses)
            optimizer.step()
        record = optimizer.last_step
        assert record is not None
        assert record.present.all()
        results.append((record.weights, record.grad_norms, list(model.state_dict().values())))
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@given(K=NUM_TASKS, seed=SEEDS)
def test_a_pass_that_is_not_finite_does_not_change_the_statistics(bad: float, K: int, seed: int) -> None:
    sampler = Sampler(seed)
    bench = Bench((4, 6), K, torch.float64, weighting=Lagged(), turn_every=NEVER)
    for _ in range(2):
        bench.step(list(grads_of(sampler, K, (4, 6))))
    before = bench.state()
    grads = grads_of(sampler, K, (4, 6))
    grads[sampler.integer(K)] *= bad
    bench.step(list(grads))
    assert not bench.record.finite
    for name in ("norm_reference.values", "loss_reference.values"):
        assert torch.equal(bench.state()[name], before[name])


def test_gradients_are_neither_collected_nor_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench((4, 6), 3, torch.float64, weighting=EqualWeighting(), turn_every=NEVER)
    sampler = Sampler(0)
    bench.step(list(sampler.normal(3, 4, 6)))
    monkeypatch.setattr(bench.optimizer._core.engine._weighing, "combine", None)
    bench.backward(list(sampler.normal(3, 4, 6)))
    assert bench.optimizer._core.engine._passes[0].met == []


@given(K=NUM_TASKS, rotate=st.booleans(), seed=SEEDS)
def test_weighting_does_not_write_to_gradients_that_others_read(K: int, seed: int, *, rotate: bool) -> None:
    """Autograd gives the gradient of a sum to both terms, in the same memory."""
    sampler = Sampler(seed, torch.float64)
    z, targets = sampler.normal(3, 5).requires_grad_(), sampler.normal(K, 3, 5)
    offsets = [sampler.normal(3, 5).requires_grad_() for _ in range(K)]
    heads = [nn.Identity() for _ in range(K)]
    weighting = Lagged()
    optimizer = RotoGradOptimizer(
        SGD([z, *offsets], lr=0.0), heads, rotate=rotate, init="haar", weighting=weighting, turn_every=NEVER
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        before = [offset.tanh() for offset in offsets]  # their operations run after those of z, backwards
        outputs = [head(z.tanh()) for head in heads]
        sums = [output + each for output, each in zip(outputs, before, strict=True)]
        optimizer.step([(each * target).sum() for each, target in zip(sums, targets, strict=True)])
        for offset, target in zip(offsets, targets, strict=True):
            assert_close(offset.grad, target * (1 - offset.detach().tanh() ** 2))


def test_cosines_are_those_of_the_latest_step_that_collected_gradients() -> None:
    bench, sampler, cosines = Bench((4, 6), 3, torch.float64, weighting=EqualWeighting(), turn_every=3), Sampler(0), []
    for _ in range(7):
        bench.step(list(sampler.normal(3, 4, 6)))
        cosines.append(bench.record.cosines)
    same = [torch.equal(then, now) for then, now in pairwise(cosines)]
    assert same == [True, True, False, True, True, False]


class Watched(EqualWeighting):
    """Records its measurements."""

    def __call__(self, measured: Measurements) -> Tensor:
        self.seen = measured
        return super().__call__(measured)


def test_cosines_of_several_passes_are_those_of_their_joined_batch() -> None:
    seen = []
    for parts in (1, 3):
        weighting, sampler = Watched(), Sampler(0)
        bench = Bench((12, 6), 3, torch.float64, weighting=weighting)
        for part in sampler.normal(3, 12, 6).view(3, parts, -1, 6).unbind(1):
            bench.shape = tuple(part.shape[1:])
            bench.backward(list(part))
        bench.optimizer.step()
        seen.append(weighting.seen)
    assert seen[0].cosines is not None
    assert_close(seen[1].cosines, seen[0].cosines, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weighting", [EqualWeighting, ProgressWeighting, RotoGradWeighting])
@pytest.mark.parametrize("first", [True, False], ids=["before the heads run", "after"])
def test_hook_of_the_user_on_z_gets_the_sum_of_all(weighting: type[Weighting], *, first: bool) -> None:
    """For example one that scales or clips the gradient at z: in every step, also if gradients are collected."""
    sampler, K = Sampler(0), 3
    seen: list[Tensor] = []
    optimizer = RotoGradOptimizer(
        SGD([torch.zeros(1).double().requires_grad_()], lr=0.1), num_tasks=K, weighting=weighting(), turn_every=2
    )

    def halved(grad: Tensor) -> Tensor:
        seen.append(grad)
        return 0.5 * grad

    for _ in range(5):
        root, grads = sampler.normal(4, 6).requires_grad_(), sampler.normal(K, 4, 6)
        z = root * 1
        if first:
            z.register_hook(halved)  # type: ignore[no-untyped-call]
        fed = optimizer.rotate(z)
        if not first:
            z.register_hook(halved)  # type: ignore[no-untyped-call]
        matrices = optimizer.rotations.matrices.clone()
        optimizer.step([(r * grad).sum() for r, grad in zip(fed, grads, strict=True)], z)
        assert optimizer.last_step is not None
        weights = optimizer.last_step.weights
        expected = sum(w * grad @ R for w, grad, R in zip(weights, grads, matrices, strict=True))
        assert_close(seen[-1], expected, rtol=1e-10, atol=1e-12)
        assert root.grad is not None
        assert_close(root.grad, 0.5 * expected, rtol=1e-10, atol=1e-12)
    assert len(seen) == 5


class Sink(torch.autograd.Function):
    """Returns its inputs, as DistributedDataParallel does with the outputs of a model."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return grads


@pytest.mark.parametrize("weighting", [EqualWeighting, ProgressWeighting, RotoGradWeighting])
@pytest.mark.parametrize("turn_every", [1, NEVER])
def test_a_task_whose_output_is_returned_but_not_used_is_absent(weighting: Any, turn_every: int) -> None:
    """Its head is part of the backward pass, without a gradient."""
    weights = []
    sinks: list[Any] = [lambda *outputs: outputs, Sink.apply]
    for sink in sinks:
        torch.manual_seed(0)
        backbone, heads = nn.Linear(3, 6), nn.ModuleList(nn.Linear(6, 2) for _ in range(2))
        bare = SGD([*backbone.parameters(), *heads.parameters()], lr=0.1)
        optimizer = RotoGradOptimizer(bare, heads, weighting=weighting(), turn_every=turn_every)
        for step in range(STEPS):
            optimizer.zero_grad()
            z = backbone(torch.randn(5, 3))
            left, right = sink(*[head(z) for head in heads])
            loss = left.square().mean() if step % 2 else left.square().mean() + right.abs().mean()
            loss.backward()
            optimizer.step()
            assert optimizer.last_step is not None
            assert optimizer.last_step.present.tolist() == [True, step % 2 == 0]
        weights.append([backbone.weight, optimizer.task_weights])
    for found, expected in zip(*weights, strict=True):
        assert torch.equal(found, expected)
