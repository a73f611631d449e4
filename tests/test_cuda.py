"""On a GPU: results equal those on the CPU, and no step makes the host wait."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Adam

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer
from rotoopt.optimizer import TURN_EVERY
from tests.asserts import assert_rotations

pytestmark = pytest.mark.cuda

K, STEPS = 3, 20
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "every step": lambda: {"turn_every": 1, "rotation_lr": 0.05},
    "EqualWeighting": lambda: {"weighting": EqualWeighting()},
    "GradNorm": lambda: {"weighting": GradNorm()},
    "mean of norms": lambda: {"weighting": GradNorm(common_norm="mean_of_norms")},
    "normalize_losses": lambda: {"normalize_losses": True},
    "rotation_size": lambda: {"rotation_size": 5, "turn_every": 1},
    "rotate": lambda: {"rotate": [True, False, True], "turn_every": 1},
    "Adam": lambda: {"rotation_optimizer": partial(Adam, lr=0.01)},
}
LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {"vectors": ((16, 8), -1), "maps": ((4, 8, 6, 6), 1)}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Disable TF32, also in the network."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


class Model(nn.Module):
    """K heads on vectors or on maps, each a layer with its own normalization."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        maps = layout == "maps"
        layer: Callable[[int, int], nn.Module] = partial(nn.Conv2d, kernel_size=3, padding=1) if maps else nn.Linear
        self.backbone = nn.Sequential(layer(8, 8), nn.Tanh(), layer(8, 8))
        self.heads = nn.ModuleList(nn.Sequential(layer(8, 8), nn.Tanh(), layer(8, 2)) for _ in range(K))

    def losses(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        z = self.backbone(x)
        return [(head(z) - 1).square().mean() * 10.0**-task for task, head in enumerate(self.heads)], z


def build(layout: str, device: str, options: str) -> tuple[Model, RotoGradOptimizer]:
    torch.manual_seed(0)
    model = Model(layout).to(device)
    bare = Adam(model.parameters(), lr=0.01)
    return model, RotoGradOptimizer(bare, model.heads, dim=LAYOUTS[layout][1], burn_in_period=5, **OPTIONS[options]())


def batch(layout: str, step: int, device: str) -> Tensor:
    x = torch.randn(LAYOUTS[layout][0], generator=torch.Generator().manual_seed(step))
    return x.to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_training_is_that_on_the_cpu(options: str, layout: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model, optimizer = build(layout, device, options)
        for step in range(STEPS):
            optimizer.zero_grad()
            optimizer.step(*model.losses(batch(layout, step, device)))
        assert_rotations(optimizer.rotations.matrices.cpu())
        results.append([*(param.detach().cpu() for param in model.parameters()), optimizer.rotations.matrices.cpu()])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)  # sums in another order, over 20 steps of training


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_synchronizes(options: str, layout: str) -> None:
    model, optimizer = build(layout, "cuda", options)
    inputs = [batch(layout, step, "cuda") for step in range(STEPS)]
    scaler = GradScaler("cuda", enabled=False)
    for step, x in enumerate(inputs):
        if step == 2:  # the first steps allocate and initialize
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.zero_grad()
            losses, z = model.losses(x)
            if options == "Adam" and step % 2:
                optimizer.backward([losses[0], None, losses[2]], z, scaler=scaler)
                optimizer.step()
            else:
                optimizer.step(losses, z)
        finally:
            if step == STEPS - 1:
                torch.cuda.set_sync_debug_mode("default")


def test_an_index_into_the_outputs_of_several_heads_synchronizes_once() -> None:
    model, optimizer = build("vectors", "cuda", "default")
    inputs, order = [batch("vectors", step, "cuda") for step in range(STEPS)], torch.arange(K, device="cuda")
    try:
        for step, x in enumerate(inputs):
            z = model.backbone(x)
            outputs = torch.stack([head(z) for head in model.heads])[order]
            optimizer.zero_grad()
            optimizer.step([out.square().mean() for out in outputs], z)
            if step == 2:
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_autocast_with_a_scaler_trains(options: str, dtype: torch.dtype) -> None:
    model, optimizer = build("maps", "cuda", options)
    scaler, values = GradScaler("cuda", init_scale=2.0**12, enabled=dtype == torch.float16), []
    x = batch("maps", 0, "cuda").contiguous(memory_format=torch.channels_last)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            losses, z = model.losses(x)
        optimizer.backward([loss.float() for loss in losses], z, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        values.append(float(torch.stack(losses).detach().sum()))
    assert values[-1] < 0.7 * values[0]
    assert optimizer.rotations.matrices.dtype == torch.float32
    assert_rotations(optimizer.rotations.matrices.cpu())


def test_own_backward_and_per_task_backward() -> None:
    for apart in (False, True):
        model, optimizer = build("vectors", "cuda", "EqualWeighting")
        for step in range(STEPS):
            optimizer.zero_grad()
            losses, _ = model.losses(batch("vectors", step, "cuda"))
            if apart and step % TURN_EVERY:
                for loss in losses:
                    torch.autograd.backward(loss, retain_graph=True)
            else:
                torch.autograd.backward(losses)
            optimizer.step()
        record = optimizer.last_step
        assert record is not None
        assert record.present.all()
        assert record.grad_norms.isfinite().all()


def test_checkpoint_of_the_cpu_resumes_on_the_gpu() -> None:
    model, optimizer = build("vectors", "cpu", "GradNorm")
    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.step(*model.losses(batch("vectors", step, "cpu")))
    moved, resumed = build("vectors", "cuda", "GradNorm")
    moved.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each_model, each, device in ((model, optimizer, "cpu"), (moved, resumed, "cuda")):
        for step in range(3):
            each.zero_grad()
            each.step(*each_model.losses(batch("vectors", 100 + step, device)))
    torch.testing.assert_close(
        [param.detach().cpu() for param in moved.parameters()],
        [param.detach() for param in model.parameters()],
        rtol=1e-4,
        atol=1e-5,
    )


def test_fold_on_the_gpu() -> None:
    model, optimizer = build("maps", "cuda", "every step")
    for step in range(5):
        optimizer.zero_grad()
        optimizer.step(*model.losses(batch("maps", step, "cuda")))
    model.eval()
    x = batch("maps", 9, "cuda")
    with torch.no_grad():
        before = [head(model.backbone(x)) for head in model.heads]
        optimizer.fold()
        after = [head(model.backbone(x)) for head in model.heads]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
