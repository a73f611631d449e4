"""Bi-Tuning behind rotations: its keys stay valid when the rotations are updated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import BiTuning
from tests.contract.models import assert_same
from tests.regularization.bi_tuning_cases import (
    assert_outputs,
    assert_queues,
    batch,
    encoder,
    fill,
    losses_of,
    make,
)
from tests.regularization.bi_tuning_oracle import BiTuningOracle
from tests.regularization.networks import FEATURES, state, train


def wrap(bi_tuning: BiTuning, **options: Any) -> RotoGradOptimizer:
    bare = SGD(bi_tuning.encoder_q.get_parameters(0.5), momentum=0.5)
    return RotoGradOptimizer(bare, heads=bi_tuning.encoder_q.heads, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "haar": {"init": "haar"},
    "identity": {},
    "part of the features": {"init": "haar", "rotation_size": 4},
    "classifier alone": {"init": "haar", "rotate": [True, False]},
    "projector alone": {"init": "haar", "rotate": [False, True]},
}


def padded(matrices: Tensor) -> Tensor:
    """Return the rotations of all features."""
    whole = torch.eye(FEATURES, dtype=matrices.dtype).repeat(2, 1, 1)
    whole[:, : matrices.shape[1], : matrices.shape[1]] = matrices
    return whole


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_keys_stay_valid_when_rotations_are_updated(options: str, seed: int) -> None:
    """Keys queued under earlier rotations are compared as if they had been rotated by the current ones."""
    bi_tuning = make(seed)
    optimizer = wrap(bi_tuning, rotation_lr=0.1, turn_every=1, **OPTIONS[options])
    expected = BiTuningOracle(bi_tuning.encoder_q, bi_tuning.K, bi_tuning.m, bi_tuning.T)
    for step in range(6):
        x_q, x_k, labels = batch(10 * seed + step)
        outputs = bi_tuning(x_q, x_k, labels)
        rotations = padded(optimizer.rotations.matrices.clone())
        assert_outputs(outputs, expected(x_q, x_k, labels, rotations), 1e-9)
        assert_queues(bi_tuning, expected)
        optimizer.zero_grad()
        optimizer.step(losses_of(outputs, labels))
    if "init" not in OPTIONS[options] or "rotate" in OPTIONS[options]:
        turned = (optimizer.rotations.matrices - torch.eye(FEATURES, dtype=torch.float64)).abs().amax(dim=(1, 2)) > 0.01
        assert turned.tolist() == OPTIONS[options].get("rotate", [True, True])


def test_task_gradients_are_those_of_the_whole_losses() -> None:
    """The contrast of the classifier is a part of its task, and uses its rotation like the cross-entropy."""
    bi_tuning = make()
    optimizer = wrap(bi_tuning, init="haar")
    fill(bi_tuning)
    expected = BiTuningOracle(bi_tuning.encoder_q, bi_tuning.K, bi_tuning.m, bi_tuning.T)
    expected.encoder_k = copy.deepcopy(bi_tuning.encoder_k)
    x_q, x_k, labels = batch(9)
    other = copy.deepcopy(bi_tuning)
    optimizer.backward(losses_of(bi_tuning(x_q, x_k, labels), labels))
    record = optimizer.last_step
    assert record is not None

    # The same without hooks: rotations folded into copies of the layers, gradients by autograd at h.
    R_head, R_projector = optimizer.rotations.matrices
    for model in (other.encoder_q, other.encoder_k):
        model.head._forward_pre_hooks.clear()
        model.projector._forward_pre_hooks.clear()
        with torch.no_grad():
            model.head.weight.copy_(model.head.weight @ R_head)
            model.projector.weight.copy_(model.projector.weight @ R_projector)
    seen: list[Tensor] = []
    other.encoder_q.pool_layer.register_forward_hook(lambda *args: seen.append(args[2]))
    losses = losses_of(other(x_q, x_k, labels), labels)
    grads = [torch.autograd.grad(loss, seen[0], retain_graph=True)[0] for loss in losses.values()]
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    assert_close(record.grad_norms, torch.stack(norms), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("options", [{}, {"rotate": False}, {"init": "haar"}])
def test_both_heads_are_tasks(options: dict[str, Any]) -> None:
    bi_tuning = make(dtype=torch.float32, m=0.99)
    optimizer = wrap(bi_tuning, rotation_lr=0.02, **options)
    seen: list[Tensor] = []
    bi_tuning.encoder_q.pool_layer.register_forward_hook(lambda *args: seen.append(args[2]))

    def one_batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
        x_q, x_k, labels = batch(step, 24, dtype=torch.float32)
        return losses_of(bi_tuning(x_q, x_k, labels), labels), seen.pop()

    history = train(optimizer, one_batch, 80)
    for task in ("classifier", "projector"):
        first, last = (sum(losses[task] for losses in history[part]) / 10 for part in (slice(3, 13), slice(-10, None)))
        assert last < 0.8 * first
    bi_tuning.eval()
    x, _, labels = batch(999, 200, dtype=torch.float32)
    assert (bi_tuning.encoder_q(x).argmax(dim=1) == labels).float().mean() > 0.8


def test_first_step_is_no_reference_for_the_projector() -> None:
    bi_tuning = make()
    optimizer = wrap(bi_tuning)
    weights = []
    for step in range(3):
        labels = batch(step)[2]
        optimizer.zero_grad()
        optimizer.step(losses_of(bi_tuning(*batch(step)), labels))
        record = optimizer.last_step
        assert record is not None
        assert record.finite
        weights.append((record.grad_norms[1].item(), record.weights[0].item()))
    assert weights[0][0] == 0.0
    assert all(norm > 0 and weight > 0.1 for norm, weight in weights[1:])


def test_resumed_run_is_the_uninterrupted_one() -> None:
    def go_on(bi_tuning: BiTuning, optimizer: RotoGradOptimizer, *steps: int) -> None:
        for step in steps:
            optimizer.zero_grad()
            optimizer.step(losses_of(bi_tuning(*batch(step)), batch(step)[2]))

    whole, part, resumed = make(), make(), make(seed=5)
    go_on(whole, wrap(whole), 0, 1, 2, 3)
    optimizer, other = wrap(part), wrap(resumed)
    go_on(part, optimizer, 0, 1)
    resumed.load_state_dict(part.state_dict())
    other.load_state_dict(optimizer.state_dict())
    go_on(resumed, other, 2, 3)
    assert_same(state(resumed), state(whole))


def test_copy_of_both_continues_like_the_original() -> None:
    bi_tuning = make()
    optimizer = wrap(bi_tuning, init="haar", rotation_size=FEATURES)
    copied, other = copy.deepcopy((bi_tuning, optimizer))
    for model, own in ((bi_tuning, optimizer), (copied, other)):
        for step in range(3):
            own.zero_grad()
            own.step(losses_of(model(*batch(step)), batch(step)[2]))
    assert_same(state(copied), state(bi_tuning))
    assert_same(other.rotations.matrices, optimizer.rotations.matrices)


def test_encoder_can_be_folded() -> None:
    bi_tuning, x = make(), batch(0)[0]
    optimizer = wrap(bi_tuning, init="haar")
    y, z, _ = bi_tuning.encoder_q(x)
    optimizer.fold()
    folded = bi_tuning.encoder_q(x)
    assert_close((folded[0], folded[1]), (y, z))
    assert encoder().state_dict().keys() == bi_tuning.encoder_q.state_dict().keys()
