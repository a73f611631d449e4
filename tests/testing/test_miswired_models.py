"""Each check finds its faults, all checks together find each fault, and the error says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from rotoopt import EqualWeighting, testing
from tests.contract.models import REP_SIZE, assert_same, snapshot
from tests.testing import miswired_models as miswired
from tests.testing.miswired_models import called, forward, on_detached, outputs_of
from tests.testing.wired import Wired

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "test_your_model.md"

REPEAT = "check_losses_repeat"
HEADS = "check_heads_are_fed"
LOSSES = "check_losses_pass_through_their_heads"
ROTATIONS = "check_rotations_reach_their_heads"
PARAMETERS = "check_parameters_are_optimized"


class Fault(NamedTuple):
    """One way to wire a model wrongly.

    Attributes:
        build: Builds such a model.
        check: The check that finds it.
        message: Message of the error.
    """

    build: Callable[[], Wired]
    check: str
    message: str


NOT_CALLED = "The head of right must be called on z, got a forward pass in which the module that `heads` holds was not"
NOT_THROUGH = "must pass through its rotated head, got one that passes through:"
NOT_TRAINED = "must run on a z that requires grad, got one that does not"

FAULTS = {
    "head called as head.forward(z)": Fault(
        forward(outputs_of(called, lambda head, z: head.forward(z))), HEADS, f"{NOT_CALLED} called.*head.forward"
    ),
    "copy of a head in heads": Fault(
        miswired.with_copied_head, HEADS, f"{NOT_CALLED} called.*another one: it is a copy"
    ),
    "heads of a model that was built before": Fault(
        miswired.with_old_model, HEADS, "head of left must be called on z.*was built twice"
    ),
    "whole model as a head": Fault(
        miswired.with_whole_model, HEADS, rf"left {NOT_TRAINED}, for any task\. .*`heads` holds the whole model"
    ),
    "head in eval mode": Fault(
        miswired.in_eval_mode, HEADS, "head of right must run in training mode, got one in eval mode"
    ),
    "one head for two tasks": Fault(
        forward(miswired.one_head_for_both), HEADS, f"{NOT_CALLED}.*of two tasks come from one"
    ),
    "a copy of the rotations is applied by hand": Fault(
        miswired.with_copied_rotations, HEADS, r"fed by optimizer.rotate\(z\), got.*copy of the rotations"
    ),
    "training continues after fold()": Fault(
        miswired.folded, HEADS, r"must be a rotation in front of the head of left, got none: fold\(\)"
    ),
    "a copy of the model is trained": Fault(
        miswired.copied_model, HEADS, "head of left must be called on z.*the model that runs.*is a copy"
    ),
    "z detached for all heads": Fault(
        forward(outputs_of(on_detached, on_detached)),
        HEADS,
        rf"left {NOT_TRAINED}, for any task\. .*z.detach\(\), or no_grad\(\)",
    ),
    "z computed outside of losses": Fault(
        miswired.z_from_before, REPEAT, "must run the whole model .* got the z of an earlier"
    ),
    "losses swapped": Fault(forward(miswired.swapped), LOSSES, f"loss of left {NOT_THROUGH} right.*order of `losses`"),
    "tensors of rotate(z) swapped": Fault(
        forward(miswired.tensors_swapped, num_tasks=2), LOSSES, f"loss of task 0 {NOT_THROUGH} task 1"
    ),
    "functional head called with z itself": Fault(
        forward(miswired.one_fed_with_z, num_tasks=2),
        LOSSES,
        rf"loss of task 1 {NOT_THROUGH} none.*did not read optimizer.rotate\(z\)",
    ),
    "skip connection around a head": Fault(
        forward(miswired.around_the_head),
        LOSSES,
        "backbone.* which the loss of right reaches without passing through a head.*a skip connection",
    ),
    "skip connection around a head, equal weights": Fault(
        forward(miswired.around_the_head, weighting=EqualWeighting()), LOSSES, "right reaches without passing through"
    ),
    "output of a head detached": Fault(
        forward(outputs_of(called, lambda head, z: called(head, z).detach() + z[:, :2])),
        LOSSES,
        f"loss of right {NOT_THROUGH} none",
    ),
    "loss of the outputs of two heads": Fault(
        forward(miswired.mixed),
        LOSSES,
        "loss of right must be computed from the output of its own head, got one that passes through that of left",
    ),
    "head under no_grad()": Fault(
        forward(miswired.without_grad), HEADS, r"must have a graph, got one without for right.*no_grad\(\)"
    ),
    "loss whose value does not depend on z": Fault(
        forward(miswired.straight_through),
        ROTATIONS,
        "front of right must change its loss, got the same loss",
    ),
    "head of inner products": Fault(
        miswired.of_inner_products,
        ROTATIONS,
        "front of right must change its loss.* inner products of inputs that are rotated alike.* `rotate`",
    ),
    "backbone missing from the optimizer": Fault(
        miswired.without_backbone, PARAMETERS, r"got 1 without: \(6, 3\) of the backbone\. Build it"
    ),
    "head missing from the optimizer": Fault(
        miswired.without_head, PARAMETERS, r"got 1 without: \(2, 6\) of the head of right\. Build it"
    ),
    "optimizer of a model that was built earlier": Fault(
        miswired.of_old_model,
        PARAMETERS,
        r"got 3 without: \(6, 3\) of the backbone; \(1, 6\) of the head of left; .*that runs",
    ),
    "batch drawn inside losses": Fault(
        miswired.drawn_inside, REPEAT, "must return the same losses in every call, got .* Draw the batch outside"
    ),
    "infinite loss": Fault(forward(miswired.overflowing), REPEAT, "`losses` must be finite, got inf for right"),
    "rotations overwritten by stretched ones": Fault(
        miswired.overwritten(1.01 * torch.eye(REP_SIZE)),
        "check_rotations",
        "must be orthogonal .* an error of 2.0e-02 .*written",
    ),
    "rotations overwritten with reflections": Fault(
        miswired.overwritten(torch.eye(REP_SIZE).flip(0)), "check_rotations", r"determinant \+1, .* signs \[-1.0"
    ),
    "rotations overwritten by NaN": Fault(
        miswired.overwritten(torch.full((6, 6), torch.nan)), "check_rotations", "got an error of nan"
    ),
    "hook that changes a gradient of a head": Fault(
        miswired.hooked("heads.left.weight"),
        "check_head_gradients",
        "of a head must be the gradient of the losses, .* a hook",
    ),
    "hook that changes a gradient of the backbone": Fault(
        miswired.hooked("backbone.0.weight"), "check_backbone_gradients", "of the backbone must be the sum of .* a hook"
    ),
    "hook that loses state on loading": Fault(
        miswired.forgetful, "check_resume", "A step after loading the saved state must equal the step without"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str) -> None:
    fault = FAULTS[name]
    wired = fault.build()
    check = getattr(testing, fault.check)
    before = snapshot(wired.model, wired.optimizer)
    with pytest.raises(AssertionError, match=fault.message):
        check(wired.optimizer) if check is testing.check_rotations else check(wired.optimizer, wired.losses)
    with pytest.raises(AssertionError, match=fault.message):
        testing.check_invariants(wired.optimizer, wired.losses)
    assert_same(snapshot(wired.model, wired.optimizer), before)


def test_every_check_finds_something() -> None:
    assert {fault.check for fault in FAULTS.values()} == set(testing.__all__) - {"check_invariants"}


def test_page_says_what_is_found() -> None:
    rows = re.findall(r"^\| (.+?) \| `(check_\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    assert {fault.replace("`", ""): check for fault, check in rows}.items() <= {
        name: fault.check for name, fault in FAULTS.items()
    }.items()
