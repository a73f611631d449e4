"""Updates of the rotations, and cosines between gradients that were collected in parts."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradWeighting
from rotoopt._capture.agreement import Sketch
from rotoopt._capture.backward_pass import BackwardPass, Met
from rotoopt._capture.representation import RotatedDims
from rotoopt._engine.turning import cosines_of, partial_cosines
from rotoopt.weighting._gradients import TaskGradients, task_mask
from rotoopt.weighting._measurements import Reference
from tests.samplers import NUM_TASKS, SEEDS, Bench, Lagged, Sampler


@given(K=NUM_TASKS, seed=SEEDS, passes=st.integers(1, 4), data=st.data())
def test_updates_do_not_depend_on_when_the_weights_are_known(
    K: int, seed: int, passes: int, data: st.DataObject
) -> None:
    """With weights known beforehand, they also do not depend on how the batch is split."""
    absent = data.draw(st.sets(st.sampled_from(range(K)), max_size=K - 2))
    results = []
    for weighting, parts in ((RotoGradWeighting(), 1), (Lagged(), passes)):
        sampler = Sampler(seed)
        options: dict[str, Any] = {"weighting": weighting, "rotation_optimizer": partial(SGD, lr=0.1)}
        bench = Bench((12, 6), K, torch.float64, **options)
        for _ in range(2):
            for part in sampler.normal(K, 12, 6).view(K, parts, -1, 6).unbind(1):
                bench.shape = tuple(part.shape[1:])
                bench.backward([None if task in absent else grad for task, grad in enumerate(part)])
            bench.optimizer.step()
        assert (bench.record.angles > 0).sum() == K - len(absent)
        results.append(bench.matrices)
    assert_close(results[1], results[0], rtol=0, atol=1e-12)  # sums of 12 samples in another order


@given(K=NUM_TASKS, seed=SEEDS, readers=st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=4))
def test_cosines_over_several_tensors_include_all_inputs_of_a_task(K: int, seed: int, readers: list[set[int]]) -> None:
    """Gradients at a tensor that only one task reads have no inner product with others."""
    sampler, read = Sampler(seed), [{task % K for task in tasks} for tasks in readers]
    mask = torch.stack([task_mask(tasks, torch.ones(K)) for tasks in read], dim=1)
    grads = sampler.normal(K, len(read), 5) * mask[:, :, None] * sampler.log_scales(K, -2, 2)[:, None, None]
    met = [
        Met(
            TaskGradients.of(at.clone(), tuple(sorted(tasks)), task_mask(tasks, torch.ones(K))),
            torch.Size([5]),
            False,
            None,
        )
        for tasks, at in zip(read, grads.unbind(1), strict=True)
        if len(tasks) > 1
    ]
    whole = grads.flatten(1)
    norms = whole.norm(dim=1)
    units = torch.where(norms > 0, 1 / norms, 0.0)[:, None] * whole
    assert_close(partial_cosines(met, norms), units @ units.mT, rtol=0, atol=1e-14)  # entries are one at most


def test_cosines_are_on_the_device_of_the_norms() -> None:
    """The tensors of a model split over devices may be on others."""
    grads = torch.ones(2, 5)
    met = Met(TaskGradients.of(grads, (0, 1), torch.ones(2, dtype=torch.bool)), torch.Size([5]), False, None)
    assert partial_cosines([met], torch.ones(2, device="meta")).device.type == "meta"


@pytest.mark.parametrize("weighting", [RotoGradWeighting, Lagged])
def test_a_step_with_one_task_does_not_update_the_rotations(weighting: Any) -> None:
    """Not even by the momentum of an optimizer: the target of a single task is its own gradient."""
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    bench = Bench((3, 4), 2, torch.float64, weighting=weighting(), rotation_optimizer=optimizer)
    for grads in torch.randn(2, 2, 3, 4).double():
        bench.step(list(grads))
    before = bench.matrices
    assert (bench.record.angles > 0).all()
    bench.step([torch.randn(3, 4).double(), None])
    assert torch.equal(bench.matrices, before)


def test_a_task_that_reads_another_tensor_alone_has_a_cosine_of_one_with_itself() -> None:
    grads = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    met = Met(TaskGradients.of(grads, (0, 1), torch.tensor([True, True, False])), torch.Size([2]), False, None)
    this: Any = SimpleNamespace(met=[met], tasks={0, 1, 2}, read_one_tensor=True)
    cosine = math.sqrt(0.5)
    expected = torch.tensor([[1.0, cosine, 0.0], [cosine, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert_close(cosines_of(this, torch.tensor([1.0, math.sqrt(2), 3.0])), expected)


def backward_pass() -> BackwardPass:
    unknown, ones = Reference.unknown(2, torch.device("cpu"), torch.float32), torch.ones(2)
    return BackwardPass(None, None, None, ones, True, True, lambda *_: ones, ones, unknown, unknown)


def test_samples_of_a_zero_gradient_agree_in_nothing() -> None:
    """Its sums are zero, and are added to those of other tensors."""
    this, z = backward_pass(), torch.randn(3, 4)
    assert torch.equal(
        this.pass_on(0, torch.zeros(3, 4), Sketch(z, RotatedDims(-1), 0), in_place=False), torch.zeros(3, 4)
    )
    (sums,) = this.sample_sums
    assert all((tensor == 0).all() for tensor in sums.state_dict().values())


@pytest.mark.parametrize(("number", "expected"), [(1, True), (2, False)])
def test_whether_all_tasks_read_one_tensor(number: int, expected: bool) -> None:
    this = backward_pass()
    this.norms += [torch.ones(2)] * number
    assert this.read_one_tensor == expected
    this.pass_on(0, torch.zeros(3, 4), None, in_place=False)
    assert not this.read_one_tensor
