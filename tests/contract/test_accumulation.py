"""Several backward passes before a step: gradients are summed, rotations are updated once with the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adam

from rotoopt import EqualWeighting, GradNorm, RotoGradOptimizer
from tests.contract.models import (
    TwoTasks,
    adam,
    assert_same,
    back_propagate,
    gradients,
    parameters,
    snapshot,
    train,
    wrap,
)

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "every step": lambda: {"turn_every": 1},
    "EqualWeighting": lambda: {"weighting": EqualWeighting()},
    "normalize_losses": lambda: {"normalize_losses": True},
    "Adam": lambda: {"rotation_optimizer": lambda params: Adam(params, lr=0.01)},
}


def start(options: str) -> tuple[TwoTasks, RotoGradOptimizer]:
    model, optimizer = wrap(adam, **OPTIONS[options]())
    train(model, optimizer, 0)
    optimizer.zero_grad()
    return model, optimizer


def known(grads: list[Tensor | None]) -> list[Tensor]:
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_the_passes_are_summed(options: str) -> None:
    """Each pass is combined separately, with weights from its own norms."""
    totals: list[list[Tensor]] = []
    for batch in (1, 2):
        model, optimizer = start(options)
        optimizer.backward(*model.losses(batch))
        totals.append(known(gradients(model)))
    model, optimizer = start(options)
    for batch in (1, 2):
        optimizer.backward(*model.losses(batch))
    expected = [first + second for first, second in zip(*totals, strict=True)]
    assert_same(known(gradients(model)), expected)


@pytest.mark.parametrize("num_passes", [2, 3, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_passes_of_one_batch_are_one_pass(options: str, num_passes: int) -> None:
    """With losses divided by the number of passes, as usual. The rotations do not depend on the divisor."""
    results = []
    for passes in (1, num_passes):
        model, optimizer = start(options)
        for _ in range(passes):
            losses, rep = model.losses(1)
            optimizer.backward([loss / passes for loss in losses], rep)
        optimizer.step()
        results.append(
            (parameters(model), optimizer.rotations.matrices, optimizer.state_dict()["rotograd"]["num_steps"])
        )
    torch.testing.assert_close(*results, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_order_of_the_passes_does_not_matter(options: str) -> None:
    results = []
    for order in ((1, 2, 3), (3, 1, 2)):
        model, optimizer = start(options)
        for batch in order:
            optimizer.backward(*model.losses(batch))
        optimizer.step()
        results.append((parameters(model), optimizer.rotations.matrices))
    torch.testing.assert_close(*results, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_clipping_between_backward_and_step(clip: Callable[..., object]) -> None:
    """Clipping applies to the final gradients of the network, and not to the rotations."""
    results = []
    for clipped in (False, True):
        model, optimizer = wrap(lambda params: SGD(params, lr=0.1))
        for batch in range(3):
            optimizer.zero_grad()
            optimizer.backward(*model.losses(batch))
            if clipped:
                clip([param for group in optimizer.param_groups for param in group["params"]], 2**-10)
                assert max(float(grad.abs().max()) for grad in known(gradients(model))) <= 2**-10
            optimizer.step()
            if batch == 0:
                results.append((optimizer.rotations.matrices.clone(), parameters(model)))
    (free, far), (clipped_rotations, near) = results
    assert_same(clipped_rotations, free)
    start_parameters = parameters(wrap()[0])
    for one, other, before in zip(near, far, start_parameters, strict=True):
        assert (one - before).norm() < (other - before).norm()


def test_zero_grad_discards_all_passes() -> None:
    model, optimizer = start("default")
    before = snapshot(model, optimizer)["optimizer"]
    optimizer.backward(*model.losses(1))
    optimizer.backward(*model.losses(2))
    optimizer.zero_grad()
    optimizer.step()
    assert_same(snapshot(model, optimizer)["optimizer"], before)


def test_gradients_arrive_once_per_pass() -> None:
    model, optimizer = wrap(weighting=GradNorm())
    arrived: list[Tensor] = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(arrived.append)  # type: ignore[no-untyped-call]
    for batch in range(2):
        optimizer.backward(*model.losses(batch))
    assert len(arrived) == 2 * len(list(model.parameters()))


def stepping(optimizer: SGD) -> Callable[[Tensor], None]:
    def hook(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return hook


def test_optimizer_in_backward() -> None:
    """A hook that steps as soon as a gradient is complete gets the combined gradient."""
    results = []
    for in_backward in (False, True):
        model, optimizer = wrap(lambda params: SGD(params, lr=0.1))
        if in_backward:
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(stepping(SGD([param], lr=0.1)))  # type: ignore[no-untyped-call]
        for batch in range(3):
            optimizer.zero_grad()
            back_propagate(model.losses(batch)[0])
            optimizer.step()
        results.append((parameters(model), optimizer.rotations.matrices))
    assert_same(*results)
