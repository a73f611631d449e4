"""Measurements of several backward passes or processes equal those of their joined batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt._torch.processes import Processes
from rotoopt.weighting import Measurements
from rotoopt.weighting._measurements import Reference, joined, joined_across
from tests.asserts import assert_same_bits, eps
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, Sampler
from tests.weighting.processes import together


@dataclass
class Pass:
    """A backward pass: gradients ``(K, n)``, zero for absent tasks and possibly bad otherwise, and losses."""

    grads: Tensor
    losses: Tensor
    present: Tensor
    finite: bool = True
    number: int = 0

    def measured(self) -> Measurements:
        bad = 1.0 if self.finite else math.nan
        norms = self.grads.double().norm(dim=1)
        units = torch.where(norms > 0, 1 / norms, 0.0)[:, None] * self.grads.double()
        return Measurements(
            norms=bad * norms.to(self.losses),
            present=self.present,
            finite=torch.tensor(self.finite),
            losses=torch.where(self.present, self.losses, math.nan),
            cosines=bad * (units @ units.mT).to(self.losses),
            norm_references=torch.full_like(self.losses, self.number),
            loss_references=torch.full_like(self.losses, self.number + 0.5),
        )


@st.composite
def passes(draw: st.DrawFn) -> list[Pass]:
    """Draw passes whose tasks have different scales, some absent, and some with non-finite values."""
    sampler, K, count = Sampler(draw(SEEDS), draw(DTYPES)), draw(NUM_TASKS), draw(st.integers(1, 4))
    scales = sampler.log_scales(K, -30, 30)[:, None]
    drawn = []
    for number in range(count):
        present = sampler.uniform(K) < 0.6
        grads = torch.where(present[:, None], scales * sampler.normal(K, 5), 0.0)
        drawn.append(Pass(grads, sampler.normal(K), present, draw(st.integers(0, 3)) > 0, number))
    return drawn


@given(drawn=passes())
def test_passes_of_a_step_are_their_joined_batch(drawn: list[Pass]) -> None:
    measured = joined([each.measured() for each in drawn])
    good = [each for each in drawn if each.finite]
    none = torch.zeros_like(drawn[0].losses)
    present = torch.stack([none.bool(), *(each.present for each in good)]).any(0)
    losses = torch.stack([none, *(torch.where(each.present, each.losses, 0.0) for each in good)]).sum(0)
    whole = Pass(torch.cat([none[:, None], *(each.grads for each in good)], dim=1), losses, present).measured()
    rounding = 40 * eps(none.dtype)
    assert_close(measured.norms, whole.norms, rtol=rounding, atol=0)
    assert_close(measured.cosines, whole.cosines, rtol=0, atol=rounding)
    assert_close(measured.losses, whole.losses, rtol=rounding, atol=rounding, equal_nan=True)
    assert torch.equal(measured.present, present)
    assert bool(measured.finite) == bool(good)
    assert_same_bits(measured.norm_references, drawn[-1].measured().norm_references)
    assert_same_bits(measured.loss_references, drawn[-1].measured().loss_references)


@pytest.mark.parametrize("name", ["losses", "cosines"])
def test_measurements_missing_in_one_pass_are_missing_in_the_step(name: str) -> None:
    one = Pass(torch.ones(2, 3), torch.ones(2), torch.ones(2, dtype=torch.bool)).measured()
    for parts in ([replace(one, **{name: None}), one], [one, replace(one, **{name: None})]):  # type: ignore[arg-type]
        assert getattr(joined(parts), name) is None
    assert getattr(joined([one, one]), name) is not None


@given(drawn=passes(), meets=st.booleans())
def test_processes_measure_their_joined_batch(drawn: list[Pass], meets: bool) -> None:
    own = [joined([each.measured()]) for each in drawn]
    own = own if meets else [replace(each, cosines=None) for each in own]

    def across(processes: Processes) -> Measurements:
        return joined_across(own[processes.rank], processes)

    expected = joined(own)
    for rank, measured in enumerate(together(len(drawn), across)):
        assert_close(measured.norms, expected.norms, rtol=4 * eps(expected.norms.dtype), atol=0)
        if meets:
            assert_close(measured.cosines, expected.cosines, rtol=0, atol=4 * eps(expected.norms.dtype))
        else:
            assert measured.cosines is None
        assert torch.equal(measured.present, expected.present)
        assert bool(measured.finite) == all(each.finite for each in drawn)
        known = {"losses": own[0], "norm_references": own[rank], "loss_references": own[rank]}
        for name, source in known.items():  # the losses already include all processes
            assert_same_bits(getattr(measured, name), getattr(source, name))


def test_unknown_references_divide_by_one() -> None:
    reference = Reference(torch.tensor([2.0, math.nan, 3.0]), torch.tensor([True, False, False]))
    assert torch.equal(reference.known_or_one(), torch.tensor([2.0, 1.0, 3.0]))


def test_references_stay_in_their_dtype() -> None:
    reference = Reference.unknown(2, torch.device("cpu"), torch.float32)
    current = torch.tensor([2.0, 3.0], dtype=torch.float64)  # of a representation with a wider dtype than the network
    updated = reference.updated(current, torch.tensor(True), burnt_in=False)
    assert_same_bits(updated.values, current.float())
