"""Mixed precision: GradScaler, autocast and bfloat16 models change nothing but the rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans, integers, sampled_from
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer, RotoGradWeighting
from tests.asserts import assert_rotations
from tests.contract.models import (
    Make,
    TwoTasks,
    adam,
    assert_moved,
    assert_same,
    back_propagate,
    gradients,
    parameters,
    sgd,
    snapshot,
    wrap,
)

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "every step": lambda: {"turn_every": 1},
    "EqualWeighting": lambda: {"weighting": EqualWeighting()},
    "callable": lambda: {"weighting": lambda grads: grads.sum(0)},
    "Adam": lambda: {"rotation_optimizer": partial(Adam, lr=0.01)},
}
# These need the losses, so they do not support `sum(losses).backward()`.
SEEING_LOSSES: dict[str, Callable[[], dict[str, Any]]] = {
    "GradNorm": lambda: {"weighting": GradNorm()},
    "normalize_losses": lambda: {"normalize_losses": True},
}
ALL = {**OPTIONS, **SEEING_LOSSES}
HUGE = 1e38


def growing() -> GradScaler:
    """Return a scaler that doubles its scale in every step: powers of two cause no rounding."""
    return GradScaler("cpu", init_scale=2.0**10, growth_interval=1)


def step(
    model: TwoTasks,
    optimizer: RotoGradOptimizer,
    scaler: GradScaler,
    batch: int,
    *,
    own: bool = False,
    overflow: bool = False,
    clip: float | None = None,
) -> None:
    losses, rep = model.losses(batch)
    if overflow:  # of the gradients; the losses are not scaled
        losses = [loss + HUGE * (loss - loss.detach()) for loss in losses]
    optimizer.zero_grad()
    if own:
        back_propagate([scaler.scale(loss) for loss in losses])
    else:
        optimizer.backward(losses, rep, scaler=scaler)
    if clip is not None:
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("make", [sgd, adam, partial(SGD, lr=0.1, fused=True), partial(Adam, lr=0.01, fused=True)])
@pytest.mark.parametrize("options", ALL)
def test_growing_scale_changes_nothing(options: str, make: Make, clip: float | None) -> None:
    results = []
    for enabled in (False, True):
        scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=1, enabled=enabled)
        model, optimizer = wrap(make, burn_in_period=2, **ALL[options]())
        before = snapshot(model, optimizer)
        for batch in range(5):
            step(model, optimizer, scaler, batch, clip=clip)
        results.append(snapshot(model, optimizer) | {"gradients": None})
        if not enabled:
            before["optimizer"]["rotograd"]["matrices"] = torch.eye(6).expand(2, 6, 6)
            assert_moved(model, optimizer, before)
        else:
            assert scaler.get_scale() == 2.0**15
    assert_same(*results)


@pytest.mark.parametrize("options", OPTIONS)
def test_own_backward_of_the_scaled_sum_is_the_same(options: str) -> None:
    """For weightings without running norms, because the scale of the gradients is unknown."""
    results = []
    for own in (False, True):
        scaler = growing()
        model, optimizer = wrap(adam, burn_in_period=2, **{"weighting": RotoGradWeighting(), **OPTIONS[options]()})
        for batch in range(5):
            step(model, optimizer, scaler, batch, own=own)
        parts = snapshot(model, optimizer)
        for key in (
            "loss_reference",
            "norm_reference",
            "known_norms",
        ):  # of unknown losses, and of norms of another scale
            parts["optimizer"]["rotograd"].pop(key)
        results.append(parts)
    assert_same(*results)


@pytest.mark.parametrize("clear", ["optimizer", "model"])
@pytest.mark.parametrize("bad", [{0}, {3}, {0, 1, 5}])
@pytest.mark.parametrize("options", ALL)
def test_overflow_changes_no_state(options: str, bad: set[int], clear: str) -> None:
    """A run with batches that overflow equals the run without them, even if only the model is cleared."""
    results = []
    for overflowing in (False, True):
        scaler = GradScaler("cpu", init_scale=2.0**10, backoff_factor=0.5, growth_interval=1000)
        model, optimizer = wrap(adam, burn_in_period=2, **ALL[options]())
        for batch in range(7):
            if batch in bad and not overflowing:
                continue
            if clear == "model":
                optimizer.zero_grad = model.zero_grad  # type: ignore[method-assign]
            before = parameters(model)
            step(model, optimizer, scaler, batch, overflow=batch in bad)
            record = optimizer.last_step
            assert record is not None
            assert bool(record.finite) == (batch not in bad)
            if batch in bad:
                assert_same(parameters(model), before)
        results.append(snapshot(model, optimizer))
    assert_same(*results)


def test_gradients_are_scaled_until_they_are_unscaled() -> None:
    found: list[list[Tensor | None]] = []
    for scaler in (GradScaler("cpu", enabled=False), GradScaler("cpu", init_scale=8.0)):
        model, optimizer = wrap()
        optimizer.backward(*model.losses(0), scaler=scaler)
        found.append(gradients(model))
        scaler.unscale_(optimizer)
        found.append(gradients(model))
    plain, _, scaled, unscaled = found
    assert_same(unscaled, plain)
    assert_same(scaled, [None if grad is None else 8 * grad for grad in plain])


def test_norms_are_reported_without_the_scale() -> None:
    records = []
    for scaler in (None, growing()):
        model, optimizer = wrap(weighting=GradNorm())
        optimizer.backward(*model.losses(0), scaler=scaler)
        records.append(optimizer.last_step)
    assert records[0] is not None
    scaled, plain = ({key: value for key, value in vars(each).items() if key != "rotations"} for each in records)
    assert_same(scaled, plain)


def test_backbone_loss_is_scaled_too() -> None:
    results = []
    for scaler in (None, growing()):
        model, optimizer = wrap()
        losses, rep = model.losses(0)
        optimizer.backward(losses, rep, backbone_loss=rep.square().sum(), scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        results.append(gradients(model))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", ALL)
def test_autocast(options: str, dtype: torch.dtype) -> None:
    """Rotations stay float32, even if the whole step runs under autocast, which is not recommended."""
    for inside in (False, True):
        scaler = GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
        model, optimizer = wrap(rotation_lr=0.5, **ALL[options]())
        reference_model, reference = wrap(rotation_lr=0.5, **ALL[options]())
        for batch in range(6):
            with torch.autocast("cpu", dtype):
                losses, rep = model.losses(batch)
            assert rep.dtype in (dtype, torch.float32)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype) if inside else nullcontext():
                optimizer.backward(losses, rep, scaler=scaler)
                scaler.step(optimizer)
            scaler.update()
            reference.zero_grad()
            reference.step(*reference_model.losses(batch))
        matrices = optimizer.rotations.matrices
        assert matrices.dtype == torch.float32
        assert_rotations(matrices)
        # Autocast rounds the network by up to 2^-8; the method adds no error.
        bound = 0.1 if dtype == torch.bfloat16 else 0.02
        torch.testing.assert_close(parameters(model), parameters(reference_model), rtol=0.0, atol=bound)


@settings(max_examples=10)
@given(shape=sampled_from([(5, 4), (3, 5, 4), (2, 4, 3, 3)]), shared=booleans(), seed=integers(0, 100))
@pytest.mark.parametrize("options", ALL)
def test_method_computes_the_same_under_autocast(options: str, shape: tuple[int, ...], shared: bool, seed: int) -> None:
    """Without a network, which autocast rounds. If no tensor is shared, every head reads a copy."""
    results = []
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        torch.manual_seed(seed)
        rep, *targets = torch.randn(4, *shape)
        rep, heads = nn.Parameter(rep), [nn.Identity() for _ in targets]
        dim = 1 if len(shape) == 4 else -1
        optimizer = RotoGradOptimizer(SGD([rep], lr=0.1), heads=heads, dim=dim, rotation_lr=0.5, **ALL[options]())
        for _ in range(3):
            with context:
                outputs = [head(rep if shared or options == "callable" else rep.clone()) for head in heads]
                optimizer.zero_grad()
                optimizer.step([(out - to).square().sum() for out, to in zip(outputs, targets, strict=True)])
        results.append([rep.detach(), optimizer.rotations.matrices])
    assert_same(*results)


@pytest.mark.parametrize("options", ALL)
def test_model_of_bfloat16(options: str) -> None:
    torch.manual_seed(0)
    model = TwoTasks().bfloat16()
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.05), heads=model.heads, **ALL[options]())
    for batch in range(6):
        rep = model.backbone(model.inputs(batch).bfloat16())
        losses = [head(rep).square().mean() + index for index, head in enumerate(model.heads.values())]
        optimizer.zero_grad()
        optimizer.step(losses, rep)
        record = optimizer.last_step
        assert record is not None
        assert record.finite
        assert record.grad_norms.dtype == torch.float32
    assert all(param.dtype == torch.bfloat16 for param in model.parameters())
    assert optimizer.rotations.matrices.dtype == torch.float32
    assert_rotations(optimizer.rotations.matrices)


def test_positional_none_as_passed_by_accelerate() -> None:
    model, optimizer = wrap()
    scaler = growing()
    optimizer.backward(*model.losses(0), scaler=scaler)
    before = parameters(model)
    scaler.step(optimizer, None)
    assert all(not torch.equal(now, then) for now, then in zip(parameters(model), before, strict=True))
