"""Lightning: the Trainer, with automatic and manual optimization, and Fabric equal a plain loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import StepLR

from rotoopt import GradNorm, RotoGradOptimizer
from tests.asserts import assert_rotations
from tests.contract.models import TwoTasks, adam, assert_moved, assert_same, back_propagate, snapshot, train, wrap
from tests.distributed.ranks import COUNT, Ranks

pytest.importorskip("lightning")

from lightning import Fabric, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

pytestmark = pytest.mark.filterwarnings(
    # Lightning 2.6 flattens its data loaders with a class that torch 2.13 deprecates.
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)

SEEING_LOSSES: dict[str, Callable[[], dict[str, Any]]] = {
    "GradNorm": lambda: {"weighting": GradNorm()},
    "normalize_losses": lambda: {"normalize_losses": True, "burn_in_period": 2},
}
OPTIONS = {"default": dict, "every step": lambda: {"turn_every": 1}, **SEEING_LOSSES}


class Training(LightningModule):
    """Trains the two-task model by automatic optimization, on batches that are defined by their seeds."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.model, self.rotograd = wrap(adam, **options)

    def training_step(self, batch: int, index: int) -> Any:
        losses, _ = self.model.losses(batch)
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> Any:
        return self.rotograd


class Scheduled(Training):
    def configure_optimizers(self) -> Any:
        return [self.rotograd], [{"scheduler": StepLR(self.rotograd, 2, gamma=0.5), "interval": "step"}]


class SeesLosses(Training):
    """Passes the losses to the optimizer in automatic optimization."""

    def training_step(self, batch: int, index: int) -> Any:
        self.losses, _ = self.model.losses(batch)
        return torch.stack(self.losses).sum()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses = [each / self.trainer.accumulate_grad_batches for each in self.losses]
        self.rotograd.backward(losses, scaler=getattr(self.trainer.precision_plugin, "scaler", None))


class Manual(Training):
    """Trains by manual optimization.

    Args:
        step: Trains on the losses and the representation of one batch.
        options: Options of the optimizer.
    """

    def __init__(self, step: Callable[[Any, list[Tensor], Tensor], None], **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.step = step

    def training_step(self, batch: int, index: int) -> Any:
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        self.step(self, *self.model.losses(batch))


class ManualSeesLosses(Manual, SeesLosses):
    """Passes the losses to the optimizer, and calls the backward pass of manual optimization by Lightning."""


class Restores(Training):
    """Loads the rotations whenever Lightning loads the model, not only when it resumes."""

    outputs: Sequence[Tensor] = ()

    def __init__(self) -> None:
        super().__init__(turn_every=1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rotograd.load_state_dict(checkpoint["optimizer_states"][0])

    def test_step(self, batch: int, index: int) -> None:
        self.outputs = self.model(self.model.inputs(batch))


def manual_backward(module: Any, losses: list[Tensor], rep: Tensor) -> None:
    module.manual_backward(torch.stack(losses).sum())
    module.optimizers().step()


def manual_backward_of_losses(module: Any, losses: list[Tensor], rep: Tensor) -> None:
    module.losses = losses
    manual_backward(module, losses, rep)


def own_backward(module: Any, losses: list[Tensor], rep: Tensor) -> None:
    optimizer = module.optimizers()  # a proxy, which would store what `backward` writes to `self`
    optimizer.backward(losses, rep)
    optimizer.step()


def step_with_losses(module: Any, losses: list[Tensor], rep: Tensor) -> None:
    module.optimizers().step(losses=losses, rep=rep)


def trainer(**options: Any) -> Trainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(accelerator="cpu", **{"max_epochs": 1, **dict.fromkeys(off, False), **options})


def fit(module: Training, batches: Iterable[int], **options: Any) -> dict[str, Any]:
    """Train ``module``, and return its state and that of its optimizer."""
    before = snapshot(*wrap(rotation_size=6))
    trainer(**options).fit(module, batches)
    assert_moved(module.model, module.rotograd, before)
    return snapshot(module.model, module.rotograd)


def plain_loop(model: TwoTasks, optimizer: RotoGradOptimizer, *batches: int) -> None:
    for batch in batches:
        optimizer.zero_grad()
        back_propagate(model.losses(batch)[0])
        optimizer.step()


def back(optimizer: RotoGradOptimizer, losses: list[Tensor], options: str) -> None:
    if options in SEEING_LOSSES:
        optimizer.backward(losses)
    else:
        back_propagate(losses)


@pytest.mark.parametrize("make", [Training, partial(Manual, manual_backward)], ids=["automatic", "manual"])
def test_sum_of_losses(make: Callable[..., Training]) -> None:
    actual = fit(make(turn_every=1), range(5))
    model, optimizer = wrap(adam, turn_every=1)
    plain_loop(model, optimizer, *range(5))
    assert_same(actual, snapshot(model, optimizer))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "make",
    [
        SeesLosses,
        partial(ManualSeesLosses, manual_backward_of_losses),
        partial(Manual, own_backward),
        partial(Manual, step_with_losses),
    ],
    ids=["automatic", "manual_backward", "backward(losses, rep)", "step(losses=, rep=)"],
)
def test_losses(make: Callable[..., Training], options: str) -> None:
    actual = fit(make(**OPTIONS[options]()), range(5))
    model, optimizer = wrap(adam, **OPTIONS[options]())
    train(model, optimizer, *range(5))
    assert_same(actual, snapshot(model, optimizer))


@pytest.mark.parametrize("options", SEEING_LOSSES)
def test_sum_does_not_show_the_losses(options: str) -> None:
    with pytest.raises(RuntimeError, match="must see the losses, got none"):
        fit(Training(**SEEING_LOSSES[options]()), range(1))


def test_scheduler() -> None:
    actual = fit(Scheduled(), range(5))
    model, optimizer = wrap(adam)
    scheduler = StepLR(optimizer, 2, gamma=0.5)
    for batch in range(5):
        plain_loop(model, optimizer, batch)
        scheduler.step()
    assert_same(actual, snapshot(model, optimizer))
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.01 / 4


@pytest.mark.parametrize("options", OPTIONS)
def test_accumulation_and_clipping(options: str) -> None:
    """The rotations are updated, and steps counted, once per optimizer step; the fifth batch is a separate step."""
    module = SeesLosses if options in SEEING_LOSSES else Training
    actual = fit(module(**OPTIONS[options]()), range(5), accumulate_grad_batches=2, gradient_clip_val=0.1)
    model, optimizer = wrap(adam, **OPTIONS[options]())
    for group in ([0, 1], [2, 3], [4]):
        optimizer.zero_grad()
        for batch in group:
            losses = [loss / 2 for loss in model.losses(batch)[0]]
            back(optimizer, losses, options)
        assert clip_grad_norm_(model.parameters(), 0.1) > 0.1
        optimizer.step()
    assert_same(actual, snapshot(model, optimizer))
    assert actual["optimizer"]["rotograd"]["num_steps"] == 3


@pytest.mark.parametrize("options", OPTIONS)
def test_resume(options: str, tmp_path: Path) -> None:
    uninterrupted, interrupted, resumed = (Manual(own_backward, **OPTIONS[options]()) for _ in range(3))
    expected = fit(uninterrupted, range(4), max_epochs=2)
    first = trainer()
    first.fit(interrupted, range(4))
    first.save_checkpoint(tmp_path / "last.ckpt")
    train(resumed.model, resumed.rotograd, 100)  # all of this is overwritten
    trainer(max_epochs=2).fit(resumed, range(4), ckpt_path=tmp_path / "last.ckpt")
    assert_same(snapshot(resumed.model, resumed.rotograd), expected)


def test_second_fit_continues() -> None:
    module = Training()
    fit(module, range(4))
    assert_same(fit(module, range(4)), fit(Training(), range(4), max_epochs=2))


@pytest.mark.parametrize("load", ["test(ckpt_path=)", "load_from_checkpoint()"])
def test_evaluation_of_a_checkpoint(load: str, tmp_path: Path) -> None:
    trained, module, path = trainer(), Restores(), tmp_path / "last.ckpt"
    trained.fit(module, range(4))
    trained.save_checkpoint(path)
    expected = [output.detach() for output in module.model(module.model.inputs(0))]
    if load == "test(ckpt_path=)":
        train(module.model, module.rotograd, 4, 5)  # the checkpoint differs from the state in memory
        trainer().test(module, range(1), ckpt_path=path, verbose=False)
    else:
        module = Restores.load_from_checkpoint(path)
        trainer().test(module, range(1), verbose=False)
    assert_same(list(module.outputs), expected)
    module.rotograd.remove()
    for rotated, plain in zip(expected, module.model(module.model.inputs(0)), strict=True):
        assert not torch.equal(rotated, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_mixed_precision(options: str, dtype: torch.dtype) -> None:
    scaled, precision = (True, "16-mixed") if dtype == torch.float16 else (False, "bf16-mixed")
    scaler, own_scaler = (GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled) for _ in range(2))
    plugin = MixedPrecision(precision, "cpu", scaler if scaled else None)  # type: ignore[arg-type]
    actual = fit(SeesLosses(**OPTIONS[options]()), range(5), plugins=[plugin], gradient_clip_val=0.1)
    model, optimizer = wrap(adam, **OPTIONS[options]())
    for batch in range(5):
        with torch.autocast("cpu", dtype):
            losses, _ = model.losses(batch)
        optimizer.zero_grad()
        optimizer.backward(losses, scaler=own_scaler)
        own_scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 0.1)
        own_scaler.step(optimizer)
        own_scaler.update()
    assert_same(actual, snapshot(model, optimizer))
    assert own_scaler.get_scale() == scaler.get_scale() == (2.0**12 if scaled else 1.0)
    assert optimizer.rotations.matrices.dtype == torch.float32
    assert_rotations(optimizer.rotations.matrices)


def fit_on(rank: int, make: Callable[..., Training], options: str) -> list[dict[str, Any]]:
    """Return the results of Lightning on this rank, and of a loop that averages the gradients itself."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": COUNT, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in variables.items()})  # as torchrun does
    batches = range(rank, 10, COUNT)
    actual = fit(make(**OPTIONS[options]()), batches, strategy="ddp", devices=COUNT)
    model, optimizer = wrap(adam, **OPTIONS[options]())
    for batch in batches:
        losses, _ = model.losses(batch)
        optimizer.zero_grad()
        back(optimizer, losses, options)
        for param in model.parameters():
            assert param.grad is not None
            dist.all_reduce(param.grad.div_(COUNT))
        optimizer.step()
    return [actual, snapshot(model, optimizer)]


# Not `own_backward`: in manual optimization, Lightning averages gradients in `manual_backward` alone.
DISTRIBUTED: list[tuple[Callable[..., Training], str]] = [
    (Training, "every step"),
    (SeesLosses, "GradNorm"),
    (partial(Manual, manual_backward), "default"),
    (partial(ManualSeesLosses, manual_backward_of_losses), "GradNorm"),
]


@pytest.mark.slow  # two more processes import Lightning
@pytest.mark.distributed
def test_distributed(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "rendezvous")
    try:
        for make, options in DISTRIBUTED:
            for actual, expected in ranks.run(fit_on, make, options):
                assert_same(actual, expected)
    finally:
        ranks.stop()


def fabric_losses(model: Any, batch: int) -> list[Tensor]:
    """Return the losses by way of ``forward``, where Fabric sets the precision."""
    left, right = model(model.inputs(batch))
    return [(left - 1).square().mean(), 0.1 * right.square().sum()]


@pytest.mark.parametrize(
    ("options", "precision"), [("default", "bf16-mixed"), *((options, "32-true") for options in OPTIONS)]
)
def test_fabric(options: str, precision: Any) -> None:
    model, optimizer = wrap(adam, **OPTIONS[options]())
    before = snapshot(*wrap(rotation_size=6))
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric_model, fabric_optimizer = fabric.setup(model, optimizer)
    plain_model, plain = wrap(adam, **OPTIONS[options]())
    for batch in range(5):
        losses = fabric_losses(fabric_model, batch)
        fabric_optimizer.zero_grad()
        if options in SEEING_LOSSES:
            fabric_optimizer.backward(losses)
        else:
            fabric.backward(torch.stack(losses).sum())
        fabric.clip_gradients(fabric_model, fabric_optimizer, max_norm=0.1)
        fabric_optimizer.step()

        with nullcontext() if precision == "32-true" else torch.autocast("cpu", torch.bfloat16):
            outputs = plain_model(plain_model.inputs(batch))
        left, right = (output.float() for output in outputs)
        plain.zero_grad()
        back(plain, [(left - 1).square().mean(), 0.1 * right.square().sum()], options)
        clip_grad_norm_(plain_model.parameters(), 0.1)
        plain.step()
    assert_moved(model, optimizer, before)
    assert_same(snapshot(model, optimizer), snapshot(plain_model, plain))
    assert optimizer.rotations.matrices.dtype == torch.float32


def test_fabric_resume(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    pairs = [wrap(adam, weighting=GradNorm(), burn_in_period=2) for _ in range(2)]
    states: list[Any] = [dict(zip(("model", "optimizer"), fabric.setup(*pair), strict=True)) for pair in pairs]
    train(*pairs[0], 0, 1, 2)
    fabric.save(tmp_path / "last.ckpt", states[0])
    train(*pairs[1], 100)  # all of this is overwritten
    fabric.load(tmp_path / "last.ckpt", states[1])
    for pair in pairs:
        train(*pair, 3, 4)
    assert_same(snapshot(*pairs[1]), snapshot(*pairs[0]))
