"""Custom weightings: one class with one method, with or without memory."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt import EqualWeighting, GradNorm, ProgressWeighting, RotoGradWeighting, Weighting
from rotoopt.optimizer import TURN_EVERY
from rotoopt.weighting import Measurements
from tests.contract.models import assert_same, back_propagate, snapshot, train, wrap
from tests.samplers import NUM_TASKS, SEEDS, Bench, Sampler


class InverseLosses(Weighting):
    """Weights 1 / L_k of the same pass."""

    needs_losses = True

    def __call__(self, measured: Measurements) -> Tensor:
        assert measured.losses is not None
        return 1.0 / measured.losses


class RunningNorms(Weighting):
    """Weights that equalize the running means of the norms."""

    lagged = True

    def __call__(self, measured: Measurements) -> Tensor:
        mean = self.state.get("mean", measured.norms)
        mean = torch.where(measured.present, 0.9 * mean + 0.1 * measured.norms, mean)
        self.state["mean"] = mean
        return mean.mean() / mean


@given(K=NUM_TASKS, seed=SEEDS)
def test_weights_of_this_pass_are_used_in_it(K: int, seed: int) -> None:
    sampler = Sampler(seed)
    bench, grads, losses = Bench((4, 6), K, torch.float64, weighting=InverseLosses()), sampler.normal(K, 4, 6), None
    losses = sampler.uniform(K) + 0.1
    received = bench.step(list(grads), losses.tolist())
    assert_close(bench.record.weights, 1 / losses, rtol=1e-12, atol=0)
    assert_close(received, (grads / losses[:, None, None]).sum(0), rtol=1e-12, atol=1e-12)


@given(K=NUM_TASKS, seed=SEEDS, absent=st.none() | st.integers(0, 9))
def test_weights_from_memory_are_used_in_the_next_step(K: int, seed: int, absent: int | None) -> None:
    sampler, mean = Sampler(seed), torch.empty(0)
    bench = Bench((4, 6), K, torch.float64, weighting=RunningNorms(), rotate=False)
    weights = torch.ones(K).double()
    for t in range(4):
        grads = list(sampler.normal(K, 4, 6))
        here = torch.tensor([t == 0 or task != absent for task in range(K)])
        bench.step([grad if present else None for grad, present in zip(grads, here, strict=True)])
        assert_close(bench.record.weights, torch.where(here, weights, 0.0), rtol=1e-12, atol=0)
        norms = torch.stack([grad.norm() for grad in grads])
        mean = norms if t == 0 else torch.where(here, 0.9 * mean + 0.1 * norms, mean)
        weights = mean.mean() / mean


@pytest.mark.parametrize("num_steps", [1, 3, TURN_EVERY + 1])
def test_memory_is_saved_and_resumed_bit_for_bit(num_steps: int) -> None:
    (model, optimizer), (other_model, other) = wrap(weighting=RunningNorms()), wrap(weighting=RunningNorms())
    train(model, optimizer, *range(num_steps))
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    train(other_model, other, 100, 101)  # all of this is overwritten
    other_model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for each_model, each in ((model, optimizer), (other_model, other)):
        train(each_model, each, 20, 21)
    assert_same(snapshot(other_model, other), snapshot(model, optimizer))
    assert "mean" in saved[1]["rotograd"]["weighting"]["RunningNorms"]


def test_saved_memory_is_a_copy_and_so_is_a_loaded_one() -> None:
    model, optimizer = wrap(weighting=RunningNorms())
    train(model, optimizer, 0)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["rotograd"])
    for _ in range(2):
        optimizer._core.engine.weighting.state["mean"].zero_()
        assert_same(saved["rotograd"], before)
        optimizer.load_state_dict(saved)


def test_loaded_memory_is_on_the_device_of_the_weighting() -> None:
    weighting, saved = RunningNorms(), {"mean": torch.ones(2)}
    weighting.load_state_dict(saved, torch.zeros((), device="meta"))
    assert weighting.state["mean"].device.type == "meta"
    weighting.load_state_dict(saved, torch.zeros(()))
    weighting.state["mean"].zero_()
    assert torch.equal(saved["mean"], torch.ones(2))


def test_copies_have_separate_memory() -> None:
    model, optimizer = wrap(weighting=RunningNorms())
    train(model, optimizer, 0)
    copied_model, copied = copy.deepcopy((model, optimizer))
    before = snapshot(copied_model, copied)
    train(model, optimizer, 1)
    after = snapshot(copied_model, copied)
    assert_same(after["optimizer"], before["optimizer"])
    copied.zero_grad()
    train(copied_model, copied, 1)
    assert_same(snapshot(copied_model, copied), snapshot(model, optimizer))


def test_memory_follows_the_representation() -> None:
    bench = Bench((4, 6), 3, torch.float32, weighting=RunningNorms())
    bench.step(list(torch.randn(3, 4, 6)))
    bench.optimizer._core.engine.memory.to(torch.device("meta"))
    assert bench.optimizer._core.engine.weighting.state["mean"].device.type == "meta"


def test_own_backward_is_an_error_if_losses_are_needed() -> None:
    model, optimizer = wrap(weighting=InverseLosses())
    with pytest.raises(RuntimeError, match=r"InverseLosses\(\) must see the losses, got none\. Call optimizer\.step"):
        back_propagate(model.losses(0)[0])
    model, optimizer = wrap(weighting=RunningNorms())
    back_propagate(model.losses(0)[0])
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.losses is None


@pytest.mark.parametrize(
    "make", [RunningNorms, InverseLosses, ProgressWeighting, RotoGradWeighting, EqualWeighting, GradNorm]
)
def test_a_weighting_belongs_to_one_optimizer(make: type[Weighting]) -> None:
    weighting = make()
    wrap(weighting=weighting)
    name = make.__name__
    message = (
        f"^`weighting` must not be shared between optimizers, got a {name} that another one uses. "
        f"Make a new {name} for this one.$"
    )
    with pytest.raises(ValueError, match=message):
        wrap(weighting=weighting)


def test_class_without_the_method_cannot_be_made() -> None:
    class Nothing(Weighting):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Nothing()  # type: ignore[abstract]


def test_checkpoint_of_another_weighting_is_rejected_if_one_of_them_has_memory() -> None:
    pairs = {make: wrap(weighting=make()) for make in (RunningNorms, RotoGradWeighting, EqualWeighting)}
    for model, optimizer in pairs.values():
        train(model, optimizer, 0)
    states = {make: optimizer.state_dict() for make, (_, optimizer) in pairs.items()}
    with pytest.raises(ValueError, match=r"must be of weighting RotoGradWeighting\(\), got that of RunningNorms\."):
        pairs[RotoGradWeighting][1].load_state_dict(states[RunningNorms])
    with pytest.raises(ValueError, match=r"must be of weighting RunningNorms\(\), got that of EqualWeighting\."):
        pairs[RunningNorms][1].load_state_dict(states[EqualWeighting])
    pairs[EqualWeighting][1].load_state_dict(states[RotoGradWeighting])  # neither has memory


def test_measurements_of_several_passes_exclude_non_finite_values() -> None:
    seen: list[Measurements] = []

    class Recorder(EqualWeighting):
        def __call__(self, measured: Measurements) -> Tensor:
            seen.append(measured)
            return super().__call__(measured)

    bench = Bench((4, 6), 2, torch.float64, weighting=Recorder())
    grads = Sampler(0).normal(2, 4, 6)
    bench.backward(list(grads), [1.0, 2.0])
    bench.backward([grads[0], grads[1] * math.nan], [3.0, 4.0])
    bench.backward([None, 2 * grads[1]], [0.0, 5.0])
    bench.optimizer.step()
    (measured,) = seen
    norms = torch.stack([grads[0].norm(), math.sqrt(5) * grads[1].norm()])
    assert_close(measured.norms, norms, rtol=1e-12, atol=0)
    assert measured.losses is not None
    assert_close(measured.losses, torch.tensor([1.0, 7.0]).double())
    assert measured.finite
    assert measured.present.all()
