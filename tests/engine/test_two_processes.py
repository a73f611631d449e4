"""Two processes with the same data equal one with the data twice. The second process is simulated.

Tests with real processes and different data are in tests/distributed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import EqualWeighting, GradNorm, ProgressWeighting, RotoGradWeighting
from rotoopt._torch.processes import Processes
from tests.samplers import NUM_TASKS, SEEDS, Bench, Lagged, Sampler

COUNT = [1]


def gather(self: Processes, local: Tensor) -> Tensor:
    return torch.stack([local] * self.count)


def sum_(self: Processes, tensor: Tensor) -> None:
    tensor *= self.count


@pytest.fixture(autouse=True, scope="module")
def same_data_on_all() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "count", property(lambda self: COUNT[0]))
        patch.setattr(Processes, "gather", gather)
        patch.setattr(Processes, "sum_", sum_)
        patch.setattr(Processes, "all", lambda self, own: own)
        yield


@given(
    K=NUM_TASKS,
    seed=SEEDS,
    make=st.sampled_from([ProgressWeighting, RotoGradWeighting, EqualWeighting, GradNorm, Lagged]),
    turn_every=st.sampled_from([1, 2]),
    scaled=st.booleans(),
    data=st.data(),
)
def test_two_processes_with_the_same_data_are_one_with_the_data_twice(
    K: int, seed: int, make: Any, turn_every: int, scaled: bool, data: st.DataObject
) -> None:
    absent = [data.draw(st.sets(st.sampled_from(range(K)), max_size=K - 1)) for _ in range(3)]
    results = []
    try:
        for count in (1, 2):
            COUNT[0], sampler = count, Sampler(seed)
            options: dict[str, Any] = {"rotation_optimizer": partial(SGD, lr=0.1), "turn_every": turn_every}
            bench = Bench((8 // count, 5), K, torch.float64, weighting=make(), **options)
            for out in absent:
                grads, values = sampler.normal(K, 4, 5), sampler.uniform(K).tolist()
                # The loss over the joined batch is the mean over processes, whose gradient DDP takes afterwards.
                grads = grads if count == 2 else torch.cat([grads, grads], dim=1) / 2
                present = [None if k in out else grad for k, grad in enumerate(grads)]
                received = bench.backward(present, values, GradScaler("cpu", init_scale=8.0) if scaled else None)
                bench.optimizer.step()
                record = bench.record
                results.append((received[:4] * 2 / count, record.grad_norms, record.weights, record.losses))
                results.append((record.cosines, record.present, record.angles, bench.matrices))
    finally:
        COUNT[0] = 1
    for one, two in zip(results[:6], results[6:], strict=True):
        for expected, found in zip(one, two, strict=True):
            assert_close(found, expected, rtol=1e-10, atol=1e-11, equal_nan=True)  # sums in another order


def test_rotations_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(self: Processes, local: Tensor) -> Tensor:
        return torch.stack([local, local + local.is_floating_point()])  # sizes are the same

    monkeypatch.setattr(Processes, "gather", gather)
    monkeypatch.setattr(Processes, "count", 2)
    bench = Bench((3, 4), 2, torch.float64, rotation_size=4)
    with pytest.raises(RuntimeError, match="rotations must be the same on all processes, got different ones"):
        bench.step(list(torch.ones(2, 3, 4)))
