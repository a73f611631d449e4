"""Agreement: how much of a gradient is signal, estimated from the samples of one batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import ProgressWeighting, RotoGradOptimizer
from rotoopt._capture.agreement import NUM_PROJECTIONS, ROUNDING, SampleSums, Sketch
from rotoopt._capture.representation import RotatedDims
from rotoopt._torch.processes import Processes
from tests import oracle
from tests.asserts import eps
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, Sampler
from tests.weighting.processes import together

VECTORS = RotatedDims(None)
# Shape of z, its rotated dimensions, and the number of samples.
LAYOUTS: list[tuple[tuple[int, ...], int | tuple[int, ...], int]] = [
    ((5, 6), -1, 5),
    ((3, 4, 6), -1, 3),
    ((3, 6, 2, 2), 1, 3),
    ((3, 4, 2, 5), (1, 3), 3),
    ((6, 4), 0, 1),
    ((6,), 0, 1),
]


def agreement(grads: Tensor, z: Tensor, seed: int = 0, dims: RotatedDims = VECTORS) -> Tensor:
    """Return the agreement of gradients ``(K, *z.shape)``."""
    return Sketch(z, dims, seed).sums(grads).agreement()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=10)
@given(K=NUM_TASKS, seed=SEEDS)
@example(K=3, seed=672)  # 1 + 2e-6 by chance, for the first layout in float64
def test_equals_the_oracle(
    layout: tuple[tuple[int, ...], int | tuple[int, ...], int], K: int, seed: int, dtype: torch.dtype
) -> None:
    """The positions of a sample are summed before the norm is computed. What may be one up to rounding is unknown."""
    (shape, dim, num_samples), sampler = layout, Sampler(seed, dtype)
    z, grads = sampler.normal(*shape), sampler.normal(K, *shape)
    dims = RotatedDims(dim)
    samples = dims.view(torch.arange(z.numel()).view(shape)).movedim(1, 2).reshape(num_samples, -1, dims.size(z.shape))
    expected = oracle.agreement(grads.flatten(1).double()[:, samples], z.flatten().double()[samples], seed)
    expected = expected.masked_fill((expected - 1).abs() < ROUNDING, torch.nan)
    assert_close(agreement(grads, z, seed, dims).double(), expected, rtol=1e4 * eps(dtype), atol=0, equal_nan=True)


@given(K=NUM_TASKS, B=st.integers(2, 16), d=st.integers(1, 24), seed=SEEDS)
def test_identical_samples_agree_completely(K: int, B: int, d: int, seed: int) -> None:
    sampler = Sampler(seed)
    z, grads = sampler.normal(1, d).expand(B, d), sampler.normal(K, 1, d).expand(K, B, d)
    assert_close(agreement(grads, z), torch.full((K,), float(B)).double())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.06])
def test_gradients_of_known_signal_and_noise(share: float) -> None:
    """If rho is the share of signal in one sample, the expectation for B samples is 1 + (B - 1) rho."""
    B, d, num_batches, sampler = 16, 12, 2000, Sampler(0)
    signal = sampler.normal(d, d)
    # Of A = M z z' + noise z': |E A|^2 = |M|^2, and for normal z, E |M z|^2 |z|^2 = (d + 2) |M|^2.
    variance = ((1 / share if share else 1.0) - (d + 2 if share else 0.0)) * float(signal.square().sum()) / d**2
    assert variance > 0
    squares = torch.zeros(2).double()
    for seed in range(num_batches):
        z, noise = sampler.normal(B, d), math.sqrt(variance) * sampler.normal(B, d)
        sums = Sketch(z, VECTORS, seed).sums((bool(share) * z @ signal.mT + noise)[None])
        squares += torch.stack([sums.sums.square().sum(), sums.lengths.square().sum()])
    # The mean over 2000 batches of an estimate from 64 projections, whose standard deviation is about its size.
    assert float(squares[0] / squares[1]) == pytest.approx(1 + (B - 1) * share, rel=0.1)


@given(K=NUM_TASKS, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=SEEDS)
@example(K=2, sizes=[3, 2], seed=0)
def test_parts_of_a_batch_and_processes_measure_the_whole(K: int, sizes: list[int], seed: int) -> None:
    sampler = Sampler(seed)
    z, grads = sampler.normal(sum(sizes), 6), sampler.normal(K, sum(sizes), 6)
    whole = agreement(grads, z)
    parts = [
        Sketch(part, VECTORS, 0).sums(of_part)
        for part, of_part in zip(torch.split(z, sizes), torch.split(grads, sizes, dim=1), strict=True)
    ]
    assert_close(SampleSums.joined(parts, Processes()).agreement(), whole, equal_nan=True)  # of one sample

    def on(processes: Processes) -> Tensor:
        return SampleSums.joined([parts[processes.rank]], processes).agreement()

    for found in together(len(parts), on):
        assert_close(found, whole, equal_nan=True)


@given(K=NUM_TASKS, seed=SEEDS, exponents=st.lists(st.integers(-60, 60), min_size=10, max_size=10))
def test_scale_of_a_loss_does_not_change_it(K: int, seed: int, exponents: list[int]) -> None:
    sampler = Sampler(seed, torch.float32)
    sums = Sketch(sampler.normal(5, 6), VECTORS, 0).sums(sampler.normal(K, 5, 6))
    scales = 2.0 ** torch.tensor(exponents[:K]).float()
    assert_close(sums.scaled(scales).agreement(), sums.agreement(), rtol=1e-5, atol=0)


def test_missing_measurements_are_unknown() -> None:
    one = Sketch(torch.ones(3, 2), VECTORS, 0).sums(torch.ones(1, 3, 2)).of_task(1, 3)
    assert one.agreement().isfinite().tolist() == [False, True, False]
    assert SampleSums.none(2, torch.ones(1)).agreement().isnan().all()


@given(K=NUM_TASKS, seed=SEEDS, dtype=DTYPES, samples=st.integers(2, 20))
def test_a_single_sample_with_a_gradient_gives_no_estimate(K: int, seed: int, dtype: torch.dtype, samples: int) -> None:
    sampler = Sampler(seed, dtype)
    grads = sampler.normal(K, samples, 6)
    grads[0, 1:] = 0.0
    sums = Sketch(sampler.normal(samples, 6), VECTORS, seed).sums(grads)
    ratios = (sums.sums[1:].norm(dim=1) / sums.lengths[1:]).square()
    assume(bool(((ratios - 1).abs() > 2 * ROUNDING).all()))  # others may be one by chance
    assert sums.agreement().isnan().tolist() == [True] + [False] * (K - 1)


class Tasks(nn.Module):
    """A task that can be learned and one that is noise, on one tensor each or on the same."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(8, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(2))
        self.apart = apart

    def losses(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, noise = torch.randn(64, 8, generator=generator), torch.randn(64, 1, generator=generator)
        z = self.backbone(x)
        inputs = [z * 1, z * 1] if self.apart else [z, z]
        return [
            (head(each) - target).square().mean()
            for head, each, target in zip(self.heads, inputs, (x[:, :1], 10 * noise), strict=True)
        ]


@pytest.mark.parametrize("apart", [False, True], ids=["one tensor", "a tensor each"])
@pytest.mark.parametrize("calls", ["step", "own backward", "a batch per task"])
def test_share_of_a_task_that_is_noise_decreases(calls: str, *, apart: bool) -> None:
    """For both ways to call backward, and for one tensor or several; no loss decreases meanwhile."""
    shares = {}
    for weighting in (ProgressWeighting(), ProgressWeighting(alpha=0.0)):
        model = Tasks(apart=apart)
        bare = SGD(model.parameters(), lr=1e-6)
        optimizer = RotoGradOptimizer(bare, model.heads, weighting=weighting, rotate=False, turn_every=2)
        for step in range(30):
            losses = model.losses(step)
            optimizer.zero_grad()
            if calls == "step":
                optimizer.step(losses)
            elif calls == "own backward":
                torch.autograd.backward(losses)
                optimizer.step()
            else:
                for task in range(2):
                    optimizer.backward([loss if k == task else None for k, loss in enumerate(model.losses(step))])
                optimizer.step()
        norms = optimizer._core.engine.weighting.state["means"][0]
        weighted = optimizer._core.engine.memory.weights * norms
        shares[weighting.alpha] = float(weighted[1] / weighted.sum())
    assert shares[0.0] == pytest.approx(0.5, abs=0.05)
    assert shares[0.75] < 0.4


@example(K=2, seed=0, factors=["number", "number"])
@given(K=NUM_TASKS, seed=SEEDS, factors=st.lists(st.sampled_from(["number", "one tensor", "by task"]), max_size=3))
def test_sums_are_linear_in_the_gradients(K: int, seed: int, factors: list[str]) -> None:
    sampler = Sampler(seed)
    sums, lengths = sampler.normal(K, NUM_PROJECTIONS**2), sampler.uniform(K)
    found, product = SampleSums(sums, lengths), torch.ones(K).double()
    for kind in factors:
        tensor = sampler.uniform(K)
        factor: Tensor | float = 2.5 if kind == "number" else tensor[0] if kind == "one tensor" else tensor
        found, product = found.scaled(factor), product * factor
    expected, nothing = (sums * product[:, None], lengths * product), (0 * sums, 0 * lengths)
    for each in (found, found.where(torch.tensor(True)), found.to(sums)):
        assert_close((each.multiplied().sums, each.multiplied().lengths), expected)
    left_out = found.where(torch.tensor(False))
    assert_close((left_out.sums, left_out.lengths), nothing)
    moved = found.to(torch.empty(0, device="meta"))
    assert {moved.sums.device.type, moved.lengths.device.type} == {"meta"}
