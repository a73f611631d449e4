"""References: in which step they are measured."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt.weighting import Measurements
from rotoopt.weighting._measurements import Reference
from tests.samplers import Bench, Sampler

K, STEPS = 3, 8
BURN_INS = st.integers(0, STEPS + 1)
# States of a task in one step; only the first one gives a reference.
KINDS = st.lists(st.lists(st.sampled_from(["valid", "absent", "zero"]), min_size=K, max_size=K), min_size=STEPS)
BAD_KINDS = st.lists(
    st.lists(st.sampled_from(["valid", "absent", "zero", "nan", "inf"]), min_size=K, max_size=K), min_size=STEPS
)
FINITE = torch.tensor(True)
VALUES = {"absent": math.nan, "zero": 0.0, "nan": math.nan, "inf": math.inf}


def expected_references(kinds: list[list[str]], values: Tensor, burn_in: int) -> Tensor:
    """Return the value at the first valid step from the burn-in on, or else at the first valid step."""
    references = torch.full((K,), math.nan)
    for task in range(K):
        valid = [t for t, kind in enumerate(kinds) if kind[task] == "valid"]
        chosen = [t for t in valid if t >= burn_in][:1] or valid[:1]
        references[task] = values[chosen[0], task] if chosen else math.nan
    return references


@given(kinds=BAD_KINDS, burn_in=BURN_INS)
def test_reference_is_the_first_valid_value_and_the_first_after_the_burn_in(
    kinds: list[list[str]], burn_in: int
) -> None:
    reference = Reference.unknown(K, torch.device("cpu"), torch.float32)
    distinct = torch.arange(1.0, len(kinds) * K + 1).view(-1, K)  # every step and task has a value of its own
    for t, kind in enumerate(kinds):
        current = torch.tensor([VALUES.get(kind[task], float(distinct[t, task])) for task in range(K)])
        reference = reference.updated(current, current < torch.inf, burnt_in=t >= burn_in)
        expected = expected_references(kinds[: t + 1], distinct, burn_in)
        assert_close(reference.values, expected, rtol=0, atol=0, equal_nan=True)


@given(log_noise=st.floats(-12, -4), log_growth=st.floats(0, 3), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_reference_at_rounding_level_is_replaced_before_the_burn_in_ends(
    log_noise: float, log_growth: float, dtype: torch.dtype
) -> None:
    """Rounding level: below the root of eps of the current value. After the burn-in, references do not change."""
    noise = torch.full((K,), 10**log_noise, dtype=dtype)
    values = noise * 10**log_growth / torch.finfo(dtype).eps ** 0.5
    first = Reference.unknown(K, torch.device("cpu"), dtype).updated(noise, FINITE, burnt_in=False)
    assert torch.equal(first.updated(values * 1.01, FINITE, burnt_in=False).values, values * 1.01)
    almost = 0.99 * noise / torch.finfo(dtype).eps ** 0.5
    assert torch.equal(first.updated(almost, FINITE, burnt_in=False).values, noise)
    settled = Reference.unknown(K, torch.device("cpu"), dtype).updated(noise, FINITE, burnt_in=True)
    assert torch.equal(settled.updated(values * 1.01, FINITE, burnt_in=True).values, noise)


@given(kinds=KINDS, burn_in=BURN_INS, passes=st.integers(1, 2))
def test_references_of_the_optimizer(kinds: list[list[str]], burn_in: int, passes: int) -> None:
    bench = Bench((2, 3), K, torch.float32, burn_in_period=burn_in)
    distinct = 2.0 ** (torch.arange(len(kinds) * K) / 16).view(-1, K)  # no value replaces an earlier one
    taken = []  # steps without any loss do not count
    for t, kind in enumerate(kinds):
        if all(each == "absent" for each in kind):
            continue
        taken.append(t)
        units = torch.zeros(K, 2, 3)
        units[:, 0, 0] = torch.tensor([0.0 if each == "zero" else 1.0 for each in kind])
        for first in [True, False][:passes]:  # of several backwards before a step, the first counts
            size = distinct[t] * (1.0 if first else 3.0)
            grads = [None if kind[k] == "absent" else units[k] * size[k] for k in range(K)]
            # Minus: the reference of a negative loss is its absolute value.
            bench.backward(grads, [-float(units[k, 0, 0] * size[k] * 2) for k in range(K)])
        bench.optimizer.step()
        expected = expected_references([kinds[i] for i in taken], distinct[taken], burn_in)
        state = bench.state()
        # The gradients have been rotated, which changes some bits of their norms.
        assert_close(state["norm_reference.values"], expected, rtol=1e-5, atol=0, equal_nan=True)
        assert_close(state["loss_reference.values"], 2 * expected, rtol=0, atol=0, equal_nan=True)


def measurements(norms: Tensor, losses: Tensor | None, references: Tensor) -> Measurements:
    everywhere = torch.ones(K, dtype=torch.bool)
    return Measurements(norms, everywhere, torch.tensor(True), losses, None, references, references)


@given(seed=st.integers(0, 2**32 - 1))
def test_ratio_of_an_unknown_norm_is_unknown_and_that_of_an_unknown_loss_is_the_loss(seed: int) -> None:
    current = Sampler(seed, torch.float32).uniform(K)
    measured = measurements(current, current, torch.full((K,), math.nan))
    assert measured.norm_ratios.isnan().all()
    assert measured.loss_ratios is not None
    assert torch.equal(measured.loss_ratios, current)


@given(seed=st.integers(0, 2**32 - 1))
def test_ratios_are_those_to_the_references(seed: int) -> None:
    references, current = Sampler(seed).uniform(2, K) + 0.1
    measured = measurements(current, -current, references)
    assert measured.loss_ratios is not None
    assert_close(measured.norm_ratios * references, current, rtol=1e-14, atol=0)
    assert_close(measured.loss_ratios * references, -current, rtol=1e-14, atol=0)
    assert measurements(current, None, references).loss_ratios is None


def test_saved_and_loaded_references_share_no_memory() -> None:
    unknown = Reference.unknown(K, torch.device("cpu"), torch.float32)
    saved = unknown.updated(torch.full((K,), 2.0), FINITE, burnt_in=True)
    state = saved.state_dict()
    loaded = unknown.loaded(state)
    for tensor in state.values():
        tensor.zero_()
    for reference in (saved, loaded):
        assert torch.equal(reference.values, torch.full((K,), 2.0))
        assert reference.settled.all()


def test_loaded_references_are_copies_in_the_dtype_of_those_they_replace() -> None:
    saved = {"values": torch.tensor([1.5, math.nan, 3.0]), "settled": torch.tensor([True, False, True])}
    for dtype in (torch.float32, torch.float64):
        loaded = Reference.unknown(K, torch.device("cpu"), dtype).loaded(saved)
        assert_close(loaded.values, saved["values"].to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(loaded.settled, saved["settled"])
        loaded.values.zero_()
        loaded.settled.zero_()
    assert saved["values"][0] == 1.5
    assert saved["settled"][0]


def test_references_move_as_a_whole() -> None:
    moved = Reference.unknown(K, torch.device("cpu"), torch.float32).to(torch.device("meta"))
    assert moved.values.device == moved.settled.device == torch.device("meta")
    assert (moved.values.dtype, moved.settled.dtype) == (torch.float32, torch.bool)


def test_loaded_references_are_on_the_device_of_those_they_replace() -> None:
    state = Reference.unknown(K, torch.device("cpu"), torch.float32).state_dict()
    loaded = Reference.unknown(K, torch.device("meta"), torch.float32).loaded(state)
    assert loaded.values.device == loaded.settled.device == torch.device("meta")
