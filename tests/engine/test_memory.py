"""The memory: its device and dtype, and records of unfinished steps."""

import math

import torch
from torch import Tensor, nn
from torch.optim import SGD

from rotoopt import GradNorm, RotoGradOptimizer
from rotoopt._engine.memory import Memory
from tests.contract.models import back_propagate, wrap


def test_everything_has_the_device_and_dtype_of_the_network() -> None:
    weight = nn.Parameter(torch.zeros(1, device="meta", dtype=torch.float64))
    memory = RotoGradOptimizer(SGD([weight], lr=0.1), num_tasks=3)._core.engine.memory
    check(memory, weight)
    on_cpu = RotoGradOptimizer(SGD([nn.Parameter(torch.zeros(1))], lr=0.1), num_tasks=3)._core.engine.memory
    memory.load_state_dict(on_cpu.state_dict())
    check(memory, weight)


def check(memory: Memory, weight: Tensor) -> None:
    tensors = [memory.weights, memory.known_norms, memory.total_angles]
    tensors += [memory.norm_reference.values, memory.loss_reference.values]
    for tensor in tensors:
        assert tensor.shape == (3,)
        assert (tensor.device, tensor.dtype) == (weight.device, weight.dtype)
    for reference in (memory.norm_reference, memory.loss_reference):
        assert (reference.settled.device, reference.settled.dtype) == (weight.device, torch.bool)


def test_options_reach_the_backward_pass() -> None:
    model, optimizer = wrap()
    losses, _ = model.losses(0)
    optimizer._core.engine.backward(losses, None, None, retain_graph=True)
    weights = [next(head.parameters()) for head in model.heads.values()]
    again = torch.autograd.grad(losses[0], weights[0])[0]  # the graph was retained
    assert isinstance(weights[0].grad, Tensor)
    assert torch.equal(again, weights[0].grad)


def test_record_before_the_step_and_with_unknown_losses() -> None:
    model, optimizer = wrap()
    back_propagate(model.losses(0)[0])
    optimizer.backward(*model.losses(1))
    record = optimizer.last_step
    assert record is not None
    assert record.losses is None  # the losses of the first pass of this step are unknown
    assert isinstance(record.rotation_lr, float)
    assert math.isnan(record.rotation_lr)


def test_losses_are_recorded_in_the_common_dtype() -> None:
    model, optimizer = wrap()
    losses, z = model.losses(0)
    optimizer.backward([losses[0].double(), losses[1]], z)
    record = optimizer.last_step
    assert record is not None
    assert record.losses is not None
    assert record.losses.dtype == torch.float32


def test_agreement_is_measured_for_absent_tasks_in_the_next_steps_only() -> None:
    model, optimizer = wrap()
    weighing, due = optimizer._core.engine._weighing, []
    for batch in range(5):
        due.append(weighing.agreement_is_due)
        losses, z = model.losses(batch)
        optimizer.zero_grad()
        optimizer.step([losses[0], None], z)
    assert due == [True, True, False, False, False]


def test_trained_weights_are_on_the_device_of_the_network() -> None:
    weight, weighting = nn.Parameter(torch.zeros(1, device="meta", dtype=torch.float64)), GradNorm()
    RotoGradOptimizer(SGD([weight], lr=0.1), num_tasks=3, weighting=weighting)
    assert (weighting.logits.device, weighting.logits.dtype) == (weight.device, weight.dtype)
