"""Agreement: how much of the rotation gradients it takes for signal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt._rotation.cayley import DenseSkew, SampleSkew
from rotoopt._rotation.cayley_step import Agreement
from tests.asserts import assert_same_bits
from tests.samplers import NUM_SAMPLES, NUM_TASKS, SEEDS, SIZES, Sampler


def observe(agreement: Agreement, correlation: Tensor) -> Tensor:
    return agreement.observe(DenseSkew(correlation), correlation)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_repeated_gradients_agree_from_the_second_on(K: int, m: int, seed: int) -> None:
    agreement, N = Agreement(), Sampler(seed).normal(K, m, m)
    values = [observe(agreement, N) for _ in range(5)]
    assert torch.equal(values[0], torch.zeros(K).double())
    for value in values[1:]:
        assert_close(value, torch.ones(K).double(), rtol=0, atol=1e-14)
        assert (value <= 1).all()  # or a step would be longer than its cap


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_flipping_gradients_do_not_agree(K: int, m: int, seed: int) -> None:
    agreement, N = Agreement(), Sampler(seed).normal(K, m, m)
    for step in range(5):
        assert not observe(agreement, N * (-1) ** step).any()


@pytest.mark.parametrize("m", [8, 64])
def test_independent_gradients_hardly_agree(m: int) -> None:
    sampler, agreement, K = Sampler(0), Agreement(), 200
    for _ in range(60):
        value = observe(agreement, sampler.normal(K, m, m))
    # The mean of about 10 cosines, each of a standard deviation near sqrt(1 / (8 m)), halved by the clamp; times 5.
    assert value.square().mean().sqrt() <= 5 * (1 / 10 / (8 * m) / 2) ** 0.5


@pytest.mark.parametrize("signal", [0.5, 1.0, 2.0])
def test_agreement_is_the_share_of_the_signal(signal: float) -> None:
    sampler, agreement, K, m = Sampler(0), Agreement(), 200, 32
    constant = signal * sampler.normal(K, m, m)
    for _ in range(60):
        value = observe(agreement, constant + sampler.normal(K, m, m))
    assert_close(value.mean().item(), signal**2 / (signal**2 + 1), rtol=0, atol=0.02)  # 200 means, each within 0.05


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, scale=st.floats(-8, 8))
def test_scale_of_the_gradients_does_not_matter(K: int, m: int, seed: int, scale: float) -> None:
    sampler, one, other = Sampler(seed), Agreement(), Agreement()
    common = sampler.normal(K, m, m)
    for _ in range(4):
        N = common + sampler.normal(K, m, m)
        assert_close(observe(one, N), observe(other, 10**scale * N), rtol=0, atol=1e-13)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_gradients_of_zero_change_nothing(K: int, m: int, seed: int) -> None:
    """An absent task has one, and it may be absent from every second turn."""
    sampler, one, other = Sampler(seed), Agreement(), Agreement()
    common, absent = sampler.normal(K, m, m), sampler.integer(K)
    for _ in range(4):
        N = common + 0.1 * sampler.normal(K, m, m)
        value = observe(one, N)
        assert_same_bits(observe(other, N)[absent], value[absent])
        without = N.clone()
        without[absent] = 0
        assert_same_bits(observe(other, without)[absent], value[absent])


@given(K=NUM_TASKS, m=SIZES, n=NUM_SAMPLES, seed=SEEDS)
def test_form_of_the_gradient_does_not_matter(K: int, m: int, n: int, seed: int) -> None:
    sampler, one, other = Sampler(seed), Agreement(), Agreement()
    W, V = sampler.normal(K, m, n), sampler.normal(m, n)
    for _ in range(4):
        noisy = W + sampler.normal(K, m, n)
        expected = observe(one, noisy @ V.mT)
        assert_close(other.observe(SampleSkew(noisy, V), noisy @ V.mT), expected, rtol=0, atol=1e-12)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, steps=st.integers(0, 3))
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened(K: int, m: int, seed: int, steps: int) -> None:
    sampler, one, other = Sampler(seed), Agreement(), Agreement()
    for _ in range(steps):
        observe(one, sampler.normal(K, m, m))
    other.load_state_dict(one.state_dict(), torch.zeros(K).double())
    for _ in range(2):
        N = sampler.normal(K, m, m)
        assert_same_bits(observe(other, N), observe(one, N))


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, steps=st.integers(0, 3))
def test_moving_forgets_nothing(K: int, m: int, seed: int, steps: int) -> None:
    sampler, one, other = Sampler(seed), Agreement(), Agreement()
    common = sampler.normal(K, m, m)
    for _ in range(steps + 1):
        N = common + sampler.normal(K, m, m)
        other.to(torch.device("cpu"))
        assert_same_bits(observe(other, N), observe(one, N))
