"""The metric of turns: the moments of the representation, and invariance to its scale and to bad batches."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt import EqualWeighting
from rotoopt._capture.representation import RotatedDims, second_moment
from rotoopt._rotation.metric import DAMPING, Metric
from rotoopt._torch.processes import Processes
from tests.asserts import assert_same_bits, eps
from tests.contract.models import assert_same
from tests.oracle import Metric as Oracle
from tests.oracle import layout
from tests.samplers import DTYPES, LAYOUTS, SEEDS, SIZES, Bench, Layout, Sampler, rotation_gradient, unusable
from tests.weighting.processes import together


def observe(metric: Metric, z: Tensor) -> Tensor:
    """Return G after another turn."""
    nothing = z.new_zeros(1, *z.shape)
    return metric.update([rotation_gradient(nothing, nothing[0], z)], z.new_zeros(1, z.shape[1], z.shape[1]))


@given(n=st.integers(1, 30), m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_equals_the_oracle(n: int, m: int, seed: int, dtype: torch.dtype) -> None:
    sampler, metric, oracle = Sampler(seed, dtype), Metric(Processes()), Oracle(m)
    for _ in range(4):
        z = sampler.normal(n, m) * sampler.log_scales(m, -2, 2)
        assert_close(observe(metric, z).double(), oracle.update(z.double()), rtol=0, atol=100 * m * eps(dtype))


@given(m=SIZES, seed=SEEDS, power=st.integers(-30, 30))
def test_scale_of_the_representation_does_not_matter(m: int, seed: int, power: int) -> None:
    sampler, one, other = Sampler(seed), Metric(Processes()), Metric(Processes())
    for _ in range(3):
        z = sampler.normal(5, m)
        assert_same_bits(observe(other, 2.0**power * z), observe(one, z))


@given(m=SIZES, seed=SEEDS)
def test_variance_is_one_on_average(m: int, seed: int) -> None:
    sampler, metric = Sampler(seed), Metric(Processes())
    for _ in range(3):
        G = observe(metric, sampler.normal(5, m) * sampler.log_scales(m, -2, 2))
        assert_close(G.trace(), torch.tensor(m * (1 + DAMPING), dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("first", [True, False])
def test_useless_moments_are_ignored(bad: float, *, first: bool) -> None:
    sampler, metric = Sampler(0), Metric(Processes())
    z = sampler.normal(5, 3)
    before = torch.eye(3).double() * (1 + DAMPING) if first else observe(metric, z)
    assert_close(observe(metric, bad * z), before)
    if first:
        assert_close(observe(metric, z), observe(Metric(Processes()), z))


@given(count=st.integers(1, 3), m=SIZES, seed=SEEDS, dtype=DTYPES, own=DTYPES)
def test_processes_have_the_metric_of_their_joined_batch_in_the_dtype_of_the_rotations(
    count: int, m: int, seed: int, dtype: torch.dtype, own: torch.dtype
) -> None:
    """And the moments are not changed."""
    sampler = Sampler(seed, dtype)
    z, (units, target) = sampler.normal(count, 4, m), sampler.directions(2, 4, m)
    gradients, like = [rotation_gradient(units, target, each) for each in z], z.new_zeros(2, m, m).to(own)
    before = copy.deepcopy(gradients)
    metrics = together(count, lambda processes: Metric(processes).update([gradients[processes.rank]], like))
    second = z.flatten(0, 1).double().mT @ z.flatten(0, 1).double()
    expected = m * second / second.trace() + DAMPING * torch.eye(m).double()
    for G in metrics:
        assert G.dtype == own
        assert_close(G.double(), expected, rtol=0, atol=100 * m * max(eps(own), eps(dtype)))
    assert_same([each.second_moment for each in gradients], [each.second_moment for each in before])


def test_it_moves_to_the_device_of_the_rotations() -> None:
    metric = Metric(Processes())
    metric.to(torch.device("meta"))  # nothing has been measured yet
    observe(metric, Sampler(0).normal(4, 3))
    metric.to(torch.device("meta"))
    mean = metric.state_dict()["mean"]
    assert mean is not None
    assert mean.device.type == "meta"


def test_it_is_loaded_onto_the_device_of_the_rotations() -> None:
    metric, resumed = Metric(Processes()), Metric(Processes())
    observe(metric, Sampler(0).normal(4, 3))
    resumed.load_state_dict(metric.state_dict(), torch.zeros((), device="meta"))
    assert all(each is not None and each.is_meta for each in resumed.state_dict().values())


def test_a_pass_without_a_moment_is_ignored() -> None:
    sampler, metric, like = Sampler(0), Metric(Processes()), torch.zeros(2, 3, 3).double()
    units, target = sampler.directions(2, 4, 3)
    z = sampler.normal(4, 3)
    with_moment, without = rotation_gradient(units, target, z), rotation_gradient(units, target)
    expected = Metric(Processes()).update([with_moment], like)
    assert_same_bits(metric.update([without, with_moment, unusable(with_moment)], like), expected)


@given(layout_=st.sampled_from(LAYOUTS), seed=SEEDS, rest=st.integers(0, 3), dtype=DTYPES)
def test_moment_is_a_sum_over_samples(layout_: Layout, seed: int, rest: int, dtype: torch.dtype) -> None:
    shape, dim = layout_
    z, dims = Sampler(seed, dtype).normal(*shape), RotatedDims(dim)
    m = dims.size(z.shape) - rest
    samples = z.flatten()[layout(z.shape, dims.dim)[:, :m]]
    moment = second_moment(z, torch.eye(m, dtype=torch.float64), dims)
    assert_close(moment, samples.double().mT @ samples.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"turn_every": 3}, [1, 0, 0, 1, 0]),
        ({"rotate": False}, [0] * 5),
        ({"rotation_optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}, [0] * 5),
    ],
    ids=["built-in", "no rotations", "an optimizer"],
)
def test_moments_are_measured_only_for_turns(
    options: dict[str, Any], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once for all heads."""
    measured: list[int] = []

    def noted(*args: Any) -> Tensor:
        measured[-1] += 1
        return second_moment(*args)

    monkeypatch.setattr("rotoopt._capture.capture.second_moment", noted)
    bench = Bench((4, 6), 3, torch.float64, weighting=EqualWeighting(), **options)
    for step in range(5):
        measured.append(0)
        bench.step(list(Sampler(step).normal(3, 4, 6)))
    assert measured == expected
