"""Accelerate: training with prepared models and optimizers equals a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import StepLR

from rotoopt import GradNorm
from tests.asserts import assert_rotations
from tests.contract.models import adam, assert_moved, assert_same, parameters, snapshot, train, wrap

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState

SEEING_LOSSES: dict[str, Callable[[], dict[str, Any]]] = {
    "GradNorm": lambda: {"weighting": GradNorm()},
    "normalize_losses": lambda: {"normalize_losses": True, "burn_in_period": 2},
}
OPTIONS = {"default": dict, "every step": lambda: {"turn_every": 1}, **SEEING_LOSSES}


@pytest.fixture
def make() -> Iterator[Callable[..., Accelerator]]:
    """Return a function that creates an accelerator; the shared state of accelerators is reset afterwards."""
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def losses_of(model: Any, batch: int) -> list[Tensor]:
    """Return the losses computed by ``forward``, for which Accelerate sets the precision."""
    left, right = model(model.inputs(batch))
    return [(left - 1).square().mean(), 0.1 * right.square().sum()]


def back(optimizer: Any, losses: list[Tensor], options: str, backward: Any = torch.autograd.backward) -> None:
    """Back-propagate the individual losses if they are needed, otherwise their sum."""
    if options in SEEING_LOSSES:
        optimizer.backward(losses)
    else:
        backward(torch.stack(losses).sum())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_prepared_loop(make: Callable[..., Accelerator], options: str, precision: str) -> None:
    """Also with a scheduler, which Accelerate steps by its own rules."""
    accelerator = make(mixed_precision=precision)
    own_model, own = wrap(adam, **OPTIONS[options]())
    before = snapshot(*wrap(rotation_size=6))
    model, optimizer, scheduler = accelerator.prepare(own_model, own, StepLR(own, 2, gamma=0.5))
    plain_model, plain = wrap(adam, **OPTIONS[options]())
    plain_scheduler = StepLR(plain, 2, gamma=0.5)
    for batch in range(5):
        optimizer.zero_grad()
        back(optimizer.optimizer, losses_of(model, batch), options, accelerator.backward)
        optimizer.step()
        scheduler.step()

        with nullcontext() if precision == "no" else torch.autocast("cpu", torch.bfloat16):
            outputs = plain_model(plain_model.inputs(batch))
        left, right = (output.float() for output in outputs)
        plain.zero_grad()
        back(plain, [(left - 1).square().mean(), 0.1 * right.square().sum()], options)
        plain.step()
        plain_scheduler.step()
    assert_moved(own_model, own, before)
    assert_same(snapshot(own_model, own), snapshot(plain_model, plain))
    assert plain.param_groups[0]["lr"] == 0.01 / 4
    assert own.rotations.matrices.dtype == torch.float32
    assert_rotations(own.rotations.matrices)


@pytest.mark.parametrize("options", OPTIONS)
def test_accumulation_and_clipping(make: Callable[..., Accelerator], options: str) -> None:
    """The rotations are updated, and steps counted, once per optimizer step."""
    accelerator = make(gradient_accumulation_steps=2)
    own_model, own = wrap(adam, **OPTIONS[options]())
    model, optimizer = accelerator.prepare(own_model, own)
    plain_model, plain = wrap(adam, **OPTIONS[options]())
    for batch in range(6):
        with accelerator.accumulate(model):
            losses = losses_of(model, batch)
            # Accelerate divides the losses that it back-propagates itself.
            losses = [loss / 2 for loss in losses] if options in SEEING_LOSSES else losses
            back(optimizer.optimizer, losses, options, accelerator.backward)
            if accelerator.sync_gradients:
                assert accelerator.clip_grad_norm_(model.parameters(), 0.1) > 0.1
            optimizer.step()
            optimizer.zero_grad()

        back(plain, [loss / 2 for loss in losses_of(plain_model, batch)], options)
        if batch % 2 == 1:
            clip_grad_norm_(plain_model.parameters(), 0.1)
            plain.step()
            plain.zero_grad()
    assert_same(snapshot(own_model, own), snapshot(plain_model, plain))
    assert own.state_dict()["rotograd"]["num_steps"] == 3


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_resume(make: Callable[..., Accelerator], options: str, num_steps: int, tmp_path: Path) -> None:
    pairs = [wrap(adam, **OPTIONS[options]()) for _ in range(2)]
    saving, loading = make(), make()
    saving.prepare(*pairs[0])
    train(*pairs[0], *range(num_steps))
    saving.save_state(str(tmp_path))
    train(*pairs[1], 100)  # all of this is overwritten
    loading.prepare(*pairs[1])
    loading.load_state(str(tmp_path))
    for pair in pairs:
        train(*pair, 10, 11)
    assert_same(snapshot(*pairs[1]), snapshot(*pairs[0]))


def test_sum_does_not_show_the_losses(make: Callable[..., Accelerator]) -> None:
    accelerator = make()
    model, _ = accelerator.prepare(*wrap(adam, weighting=GradNorm()))
    with pytest.raises(RuntimeError, match="must see the losses, got none"):
        accelerator.backward(torch.stack(losses_of(model, 0)).sum())


@pytest.mark.parametrize("options", OPTIONS)
def test_float16(make: Callable[..., Accelerator], options: str) -> None:
    """Accelerate creates a GradScaler on GPUs only; its optimizer accepts one anywhere. The third batch overflows."""
    make()
    scaler, plain_scaler = (GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    model, own = wrap(adam, **OPTIONS[options]())
    optimizer = AcceleratedOptimizer(own, scaler=scaler)
    plain_model, plain = wrap(adam, **OPTIONS[options]())
    for batch in range(5):
        before = parameters(model)
        optimizer.zero_grad()
        losses = [loss + (1e38 * (loss - loss.detach()) if batch == 2 else 0.0) for loss in model.losses(batch)[0]]
        optimizer.optimizer.backward(losses, scaler=scaler)
        optimizer.step()
        assert optimizer.step_was_skipped == (batch == 2)
        if batch == 2:
            assert_same(parameters(model), before)
            plain_scaler.update(plain_scaler.get_scale() / 2)
            continue
        plain.zero_grad()
        plain.backward(plain_model.losses(batch)[0], scaler=plain_scaler)
        plain_scaler.step(plain)
        plain_scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_same(snapshot(model, own), snapshot(plain_model, plain))
