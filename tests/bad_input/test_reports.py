"""Warnings, issued once and at the user's line, and non-finite numbers in ``last_step``."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from rotoopt import GradNorm, RotoGradOptimizer
from rotoopt._engine.watch import SILENT_STEPS, UNTRAINED_STEPS
from tests.asserts import assert_reads_well
from tests.contract.models import (
    TwoTasks,
    assert_moved,
    assert_same,
    back_propagate,
    parameters,
    snapshot,
    train,
    wrap,
)

IDLE = r"heads should have run in training mode before step\(\), got 2 steps and no head that ran. Either \(a\)"
FROZEN = r"The representation should require grad, got one that does not. Either \(a\) the backbone is frozen"


def assert_warns_once(calls: Sequence[Callable[[], object]], message: str) -> None:
    """Assert that all calls together issue one warning, which points to this file."""

    def run() -> None:
        for call in calls:
            call()

    with pytest.warns(UserWarning, match=message) as record:
        run()
    assert [warning.filename for warning in record] == [__file__]
    assert_reads_well(str(record[0].message))


@pytest.mark.parametrize("trained_by", ["no optimizer", "another optimizer", "frozen"])
def test_parameters_of_a_head_that_no_optimizer_updates(trained_by: str) -> None:
    model = TwoTasks()
    bare = SGD([*model.backbone.parameters(), *model.heads["left"].parameters()], lr=0.1)
    optimizer, other = RotoGradOptimizer(bare, heads=model.heads), SGD(model.heads["right"].parameters(), lr=0.1)
    model.heads["right"].requires_grad_(trained_by != "frozen")

    def step(batch: int) -> None:
        optimizer.zero_grad()
        optimizer.step(*model.losses(batch))
        if trained_by == "another optimizer":
            other.step()

    steps = [partial(step, batch) for batch in range(2 * UNTRAINED_STEPS)]
    if trained_by == "no optimizer":
        message = "Every parameter of a head should be updated, by this .* one, got no change of weight of right"
        assert_warns_once(steps, message)
    else:
        for each in steps:
            each()


def test_head_without_gradient_in_the_users_own_backward() -> None:
    """In ``step(losses)``, ``None`` marks an absent task."""
    model, optimizer = wrap()

    def step(batch: int) -> None:
        optimizer.zero_grad()
        back_propagate(model.losses(batch)[0][:1])
        optimizer.step()

    message = f"Every head should deliver a gradient, got none from right in {SILENT_STEPS} steps of your own"
    assert_warns_once([partial(step, batch) for batch in range(2 * SILENT_STEPS)], message)
    model, optimizer = wrap()
    for batch in range(2 * SILENT_STEPS):
        optimizer.zero_grad()
        optimizer.step([model.losses(batch)[0][0], None])


def eval_mode(model: TwoTasks) -> TwoTasks:
    return model.eval()


def other_model(model: TwoTasks) -> TwoTasks:
    return TwoTasks()


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("mistake", [eval_mode, other_model])
def test_heads_that_never_run(mistake: Callable[[TwoTasks], TwoTasks], scheduled: bool) -> None:
    model, optimizer = wrap()
    if scheduled:
        StepLR(optimizer, 1)

    def step(batch: int) -> None:
        optimizer.zero_grad()
        back_propagate(mistake(model).losses(batch)[0])
        optimizer.step()

    step(0)  # a single one may be a library that initializes the state of the optimizer
    assert_warns_once([partial(step, 1)], IDLE)
    step(2)


def test_heads_that_stopped_running() -> None:
    """As after a validation that left the model in eval mode; a task that was absent for a while is no fault."""
    model, optimizer = wrap()

    def step(batch: int) -> None:
        optimizer.zero_grad()
        back_propagate(model.losses(batch)[0])
        optimizer.step()

    for _ in range(2):
        model.train()
        step(0)
        model.eval()
        for batch in range(SILENT_STEPS - 1):
            step(batch)
    assert_warns_once([partial(step, 1)], f"got {SILENT_STEPS} steps and no head that ran")
    step(2)


def test_gradients_that_are_written_after_zero_grad() -> None:
    """As in PCGrad, which replaces them: what the heads delivered is discarded."""
    model, optimizer = wrap()
    params = list(model.parameters())

    def step(batch: int) -> None:
        gradients = torch.autograd.grad(torch.stack(model.losses(batch)[0]).sum(), params)
        optimizer.zero_grad()
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        optimizer.step()

    for batch in range(SILENT_STEPS - 1):
        step(batch)
    assert_warns_once(
        [partial(step, 1)], r"no head that ran.*\(e\) optimizer\.zero_grad\(\) comes between backward\(\)"
    )


def test_step_after_a_rejected_one_does_not_report_a_frozen_backbone() -> None:
    """In a loop that continues after an error; warnings are errors here."""
    model, optimizer = wrap()
    for batch in range(4):
        optimizer.zero_grad()
        losses = model.losses(batch)[0]
        with pytest.raises(RuntimeError, match="must pass through its rotated head"):
            optimizer.step(losses[::-1])
        optimizer.step()
        back_propagate(losses)
        optimizer.step()


@pytest.mark.parametrize("own", [False, True])
def test_backbone_that_is_frozen_from_the_start(own: bool) -> None:
    model, optimizer = wrap()
    model.backbone.requires_grad_(False)

    def step(batch: int) -> None:
        optimizer.zero_grad()
        losses = model.losses(batch)[0]
        if own:
            back_propagate(losses)
        optimizer.step(None if own else losses)

    assert_warns_once([partial(step, batch) for batch in range(3)], FROZEN)


@pytest.mark.parametrize("normalize_losses", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_frozen_backbone(scheduled: bool, normalize_losses: bool) -> None:
    """The heads get their plain gradients, and nothing else changes until the backbone is trained again."""
    model, optimizer = wrap(normalize_losses=normalize_losses, turn_every=1)
    if scheduled:
        StepLR(optimizer, 1)
    train(model, optimizer, 0, 1)
    before = snapshot(model, optimizer)
    bare_model = TwoTasks()
    bare_model.load_state_dict(model.state_dict())
    bare = SGD(bare_model.parameters(), lr=0.1, momentum=0.9)
    bare.load_state_dict(before["optimizer"])
    model.backbone.requires_grad_(False)
    optimizer.zero_grad()

    def step(batch: int) -> None:
        losses, rep = model.losses(batch)
        optimizer.zero_grad()
        if batch == 4:
            optimizer.backward(losses, rep)
            optimizer.step()
        else:
            optimizer.step(losses, rep)

    assert_warns_once([partial(step, batch) for batch in (2, 3, 4)], FROZEN)
    for batch in (2, 3, 4):
        bare_model.zero_grad()
        back_propagate(bare_model.losses(batch, lambda rep: [rep @ R.mT for R in optimizer.rotations.matrices])[0])
        bare_model.backbone.zero_grad()
        bare.step()
    assert_same(parameters(model), parameters(bare_model))
    assert_same(optimizer.state_dict()["rotograd"], before["optimizer"]["rotograd"])

    model.backbone.requires_grad_(True)
    train(model, optimizer, 5)
    assert_moved(model, optimizer, before)


def test_whole_model_as_head() -> None:
    class OneTask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.layers(x))

    model = OneTask()
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), heads=[model])
    losses = [model(torch.ones(2, 3)).sum()]
    assert_warns_once(
        [lambda: optimizer.step(losses)], r"\(b\) `heads` holds the whole model, whose input is then rotated"
    )


def test_forgotten_zero_grad_accumulates_as_usual() -> None:
    model, optimizer = wrap(heads=[TwoTasks().requires_grad_(False).heads["left"]])
    optimizer.remove()
    optimizer = RotoGradOptimizer(optimizer.optimizer, heads=[model.heads["left"]])
    bare_model, _ = wrap(num_tasks=2)
    bare = SGD(bare_model.parameters(), lr=0.1, momentum=0.9)
    for batch in range(3):
        optimizer.step(model.losses(batch)[0][:1])
        back_propagate(bare_model.losses(batch)[0][:1])
        bare.step()
    assert_same(parameters(model), parameters(bare_model))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize_losses", [False, True])
def test_non_finite_loss_is_reported(value: float, normalize_losses: bool, steps: int) -> None:
    """Rotations, references and trained weights do not change; the parameters are left to torch."""
    model, optimizer = wrap(normalize_losses=normalize_losses, rotation_size=6, weighting=GradNorm())
    train(model, optimizer, *range(steps))
    model(model.inputs(0))  # records what enters the heads
    own = optimizer.state_dict()["rotograd"]
    left, right = model.losses(5)[0]
    optimizer.zero_grad()
    optimizer.step([left, right * value])
    record = optimizer.last_step
    assert record is not None
    assert not record.finite
    assert record.losses is not None
    assert_same(record.losses[0], left.detach())
    assert_same(record.losses[1], (right * value).detach())
    after = optimizer.state_dict()["rotograd"]
    assert after["num_steps"] == steps + 1
    for state in (own, after):
        state["logits"] = state["weighting"]["GradNorm"]["logits"]
        del state["num_steps"], state["rotation_step"], state["weighting"]
    assert_same(after, own)


def test_non_finite_gradient_of_a_finite_loss_is_reported() -> None:
    model, optimizer = wrap(rotation_size=6)
    left, right = (output.square().mean() for output in model(model.inputs(0)))
    optimizer.step([left + (0 * left).sqrt(), right])
    record = optimizer.last_step
    assert record is not None
    assert record.losses is not None
    assert record.losses.isfinite().all()
    assert not record.finite
    assert_same(optimizer.rotations.matrices, torch.eye(6).expand(2, 6, 6))


def test_backbone_that_is_frozen_from_the_start_in_steps_with_losses() -> None:
    """Its heads ran: no warning says that none did."""
    model, optimizer = wrap()
    model.backbone.requires_grad_(False)

    def step(batch: int) -> None:
        optimizer.zero_grad()
        optimizer.step(model.losses(batch)[0])

    assert_warns_once([partial(step, batch) for batch in range(3)], FROZEN)
