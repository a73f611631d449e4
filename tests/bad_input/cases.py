"""How a wrong call is tested: its error, that no state has changed, and that training can continue."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from rotoopt import RotoGradOptimizer
from tests.asserts import assert_reads_well
from tests.contract.models import TwoTasks, adam, assert_same, snapshot, train, wrap

# Called with the model and its optimizer; runs the correct part of the call. Returns the call that fails.
Prepare = Callable[[TwoTasks, Any], Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One mistake of a user.

    Attributes:
        error: Type of the error.
        message: A regular expression for the rule and the hint.
        prepare: Runs everything before the call that fails.
        options: Options of the optimizer; created for each optimizer.
        first: Whether to test it in the first step.
        later: Whether to test it after two steps.
        inside: Whether it is detected inside the backward pass, when some gradients have been accumulated already.
        fatal: Whether the optimizer was built wrong, so that the next call cannot succeed.
    """

    error: type[Exception]
    message: str
    prepare: Prepare
    options: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    first: bool = True
    later: bool = True
    inside: bool = False
    fatal: bool = False


def parametrize(cases: dict[str, Case]) -> pytest.MarkDecorator:
    """Test every case in the first step and after two steps, where applicable."""
    params = [
        pytest.param(case, steps, id=f"{name}-{'later' if steps else 'first'}")
        for name, case in cases.items()
        for steps, applies in ((0, case.first), (2, case.later))
        if applies
    ]
    return pytest.mark.parametrize(("case", "steps"), params)


def check(case: Case, steps: int) -> None:
    """Assert the error, and that nothing has changed except the gradients of a backward pass."""
    results = []
    for fails in (True, False):
        model, optimizer = wrap(adam, **{name: make() for name, make in case.options.items()})
        if not case.fatal:
            with torch.no_grad():  # makes the rotations
                model(model.inputs(5))
        for batch in range(steps):
            step(model, optimizer, batch)
        call = case.prepare(model, optimizer)
        before = snapshot(model, optimizer)
        with pytest.raises(case.error, match=case.message) if fails else nullcontext() as raised:
            if fails:
                call()
        if raised is not None:
            assert_reads_well(str(raised.value))
        after = snapshot(model, optimizer)
        for state in (before, after):
            del state["optimizer"]["rotograd"]["places"]  # noted in a forward pass
            if case.inside:
                del state["gradients"]
        assert_same(after, before)
        if case.fatal:
            return
        model.train()
        step(model, optimizer, 8)
        step(model, optimizer, 9)
        results.append(snapshot(model, optimizer))
    assert_same(*results)


def step(model: TwoTasks, optimizer: RotoGradOptimizer, batch: int) -> None:
    if not optimizer._core.heads:
        optimizer.zero_grad()
        optimizer.step(*model.losses(batch, optimizer.rotate))
    else:
        train(model, optimizer, batch)


def representation(model: TwoTasks, batch: int = 5) -> Tensor:
    rep = model.backbone(model.inputs(batch))
    assert isinstance(rep, Tensor)
    return rep


def losses_of(*outputs: Tensor) -> list[Tensor]:
    return [output.square().mean() for output in outputs]


def left(model: TwoTasks) -> torch.nn.Module:
    return model.heads["left"]


def right(model: TwoTasks) -> torch.nn.Module:
    return model.heads["right"]
