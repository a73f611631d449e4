"""Changes during training, and heads that change their inputs: correct, or an error."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt._capture import dependence, labels
from rotoopt._capture.moves import picked
from rotoopt._capture.wiring import LOOK_EVERY
from rotoopt.testing._branching.model import Call
from tests.contract.models import TwoTasks, assert_same, back_propagate, sgd, wrap


def weight_of(model: TwoTasks) -> Tensor:
    return next(model.backbone.parameters())


@pytest.mark.parametrize("own", [False, True])
def test_a_loss_that_later_uses_two_outputs_is_rejected_soon(own: bool) -> None:
    model, optimizer = wrap()

    def step(batch: int) -> None:
        left, right = model(model.inputs(batch))
        losses = [left.square().mean(), right.square().mean()]
        if batch > 1:
            losses[0] = losses[0] + (left - right).square().mean()
        optimizer.zero_grad()
        if own:
            back_propagate([losses[0] + losses[1]])
            optimizer.step()
        else:
            optimizer.step(losses)

    def steps() -> None:
        for batch in range(2 * LOOK_EVERY):
            step(batch)

    with pytest.raises(RuntimeError, match=r"The loss of left must be computed from the output of its own head"):
        steps()


@pytest.mark.parametrize("mixes", [False, True])
def test_an_index_on_a_device_is_read_once(mixes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later checks do not wait for it, and find other changes all the same."""
    reads: list[str] = []

    def noted(node: Any, operation: str, of_input: Tensor) -> Tensor | None:
        reads.append(operation)
        return picked(node, operation, of_input)

    monkeypatch.setattr(dependence, "is_on_host", lambda node: False)
    monkeypatch.setattr(labels, "picked", noted)
    model, optimizer = wrap()

    def steps() -> None:
        for batch in range(3 * LOOK_EVERY):
            both = torch.cat(model(model.inputs(batch)), dim=1)[:, torch.arange(3)]
            left, right = both[:, :1], both[:, 1:]
            losses = [left.square().mean(), right.square().mean()]
            if mixes and batch > LOOK_EVERY:
                losses[0] = (left - right).square().mean()
            optimizer.zero_grad()
            optimizer.step(losses)

    with pytest.raises(RuntimeError, match=r"The loss of left must be") if mixes else nullcontext():
        steps()
    assert reads == ["Index"] * (3 if mixes else 1)  # again for other operations, and once more before an error


def test_heads_may_write_to_containers_that_they_get() -> None:
    model = TwoTasks()

    def read(layers: nn.ModuleDict, z: Tensor, log: dict[str, Any], extra: list[Tensor]) -> Tensor:
        out: Tensor = layers["out"](z)
        log["seen"] = len(z)
        extra.append(out.mean())
        return out

    heads = {name: Call(read, out=nn.Linear(6, 2)) for name in ("left", "right")}
    optimizer = RotoGradOptimizer(sgd([*model.backbone.parameters(), *nn.ModuleDict(heads).parameters()]), heads)
    log: dict[str, dict[str, Any]] = {name: {} for name in heads}
    z, losses = model.backbone(model.inputs(0)), []
    for name, head in heads.items():
        extra: list[Tensor] = []
        losses.append(head(z, log[name], extra).square().mean() + extra[0])
    optimizer.step(losses)
    assert log == {"left": {"seen": len(z)}, "right": {"seen": len(z)}}


@pytest.mark.parametrize("masked", [False, True], ids=["mask in evaluation", "keywords in evaluation"])
def test_evaluation_may_call_a_head_in_another_way(masked: bool) -> None:
    """With a mask that training did not pass, or by keyword."""

    def read(layers: nn.ModuleDict, z: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = layers["out"](z)
        return out if mask is None else out * mask

    torch.manual_seed(0)
    backbone = nn.Linear(3, 6)
    heads = nn.ModuleList(Call(read, out=nn.Linear(6, 2)) for _ in range(2))
    bare = SGD([*backbone.parameters(), *heads.parameters()], lr=0.1)
    optimizer, x, mask = RotoGradOptimizer(bare, heads, init="haar"), torch.randn(4, 3), torch.ones(4, 1)
    optimizer.step([head(backbone(x), *([mask] if masked else [])).square().mean() for head in heads])
    heads.eval()
    with torch.no_grad():
        z = backbone(x)
        expected = [head(z, mask) if masked else head(z) for head in heads]
        found = [head(mask=mask, z=z) if masked else head(z, mask) for head in heads]
    assert_same(found, expected)
    rotated = z @ optimizer.rotations[0].mT
    assert_close(found[0], F.linear(rotated, *heads[0].layers["out"].parameters()))  # type: ignore[union-attr, index]


def test_a_failed_backward_pass_leaves_nothing_behind() -> None:
    """If z is a parameter, the next pass uses the same tensor."""
    z, heads = nn.Parameter(torch.randn(4, 6)), nn.ModuleList(nn.Linear(6, 2) for _ in range(2))
    optimizer = RotoGradOptimizer(SGD([z, *heads.parameters()], lr=0.1), heads)

    def losses(scale: Tensor) -> list[Tensor]:
        return [(head(z) * scale).square().mean() for head in heads]

    def fail(grad: Tensor) -> None:
        raise MemoryError("as by a batch that is too large")

    failing = torch.ones((), requires_grad=True)
    first, second = losses(torch.ones(())), losses(failing * 1)
    second[1].register_hook(fail)  # type: ignore[no-untyped-call]
    with pytest.raises(MemoryError):
        optimizer.backward([first[0], second[1]])
    optimizer.zero_grad()
    optimizer.step(losses(torch.ones(())))
    assert optimizer.last_step is not None
    assert optimizer.last_step.present.all()


@pytest.mark.parametrize("own", [False, True])
def test_a_probe_on_stopped_gradients_is_trained_and_does_not_affect_the_weights(own: bool) -> None:
    model, probe = TwoTasks(), nn.Linear(6, 3)
    heads = {**model.heads, "probe": probe}
    params = [*model.parameters(), *probe.parameters()]
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), heads, rotate=False)
    for batch in range(3):
        model.zero_grad()
        probe.zero_grad()
        z = model.backbone(model.inputs(batch))
        losses = [head(z).square().mean() for head in model.heads.values()]
        true = [
            torch.autograd.grad(loss, weight_of(model), retain_graph=True)[0] for loss in plain_losses(model, batch)
        ]
        of_probe = (probe(z.detach()) - 1).square().mean()
        (expected,) = torch.autograd.grad(of_probe, probe.weight, retain_graph=True)
        back_propagate([*losses, of_probe]) if own else optimizer.backward([*losses, of_probe])
        assert optimizer.last_step is not None
        weights = optimizer.last_step.weights[:2]
        assert_close(weight_of(model).grad, weights[0] * true[0] + weights[1] * true[1])
        assert_close(probe.weight.grad, expected)
        optimizer.step()


def plain_losses(model: TwoTasks, batch: int) -> list[Tensor]:
    """Return the losses of a copy that was never wrapped, at the same parameters."""
    z = model.backbone(model.inputs(batch))
    return [F.linear(z, *head.parameters()).square().mean() for head in model.heads.values()]


@pytest.mark.parametrize("other", ["loss", "backbone_loss"])
def test_a_constant_is_accepted_as_the_loss_of_an_absent_task(other: str) -> None:
    model, optimizer = wrap(sgd)
    left, right = model.losses(0)[0]
    zero = torch.zeros((), requires_grad=True)
    if other == "loss":
        optimizer.step([left, zero])
    else:
        optimizer.step([left, right], backbone_loss=zero)
    assert optimizer.last_step is not None
    assert optimizer.last_step.present.tolist() == [True, other != "loss"]


@pytest.mark.parametrize("own", [False, True])
def test_a_module_of_a_task_may_look_up_indices(own: bool) -> None:
    """An embedding of a task besides its decoder gets its own gradient; any other module without z is an error."""
    torch.manual_seed(0)
    backbone, embedding = nn.Linear(5, 6), nn.Embedding(3, 6)
    decoder, other = nn.Bilinear(6, 6, 2), nn.Linear(6, 2)
    params = nn.ModuleList([backbone, embedding, decoder, other]).parameters()
    optimizer = RotoGradOptimizer(SGD(params, lr=1e-3), {"a": (decoder, embedding), "b": other}, rotate=False)
    labels = torch.arange(4) % 3
    for _ in range(3):
        z = backbone(torch.randn(4, 5))
        losses = [100 * decoder(z, embedding(labels)).square().mean(), other(z).square().mean()]
        looked_up = F.embedding(labels, embedding.weight)
        same = 100 * F.bilinear(z, looked_up, decoder.weight, decoder.bias).square().mean()
        (expected,) = torch.autograd.grad(same, embedding.weight, retain_graph=True)
        optimizer.zero_grad()
        back_propagate(losses) if own else optimizer.backward(losses)
        assert_close(embedding.weight.grad, expected)
        optimizer.step()
    with pytest.raises(TypeError, match="A floating-point tensor must enter a head"):
        other(labels)
    with pytest.raises(TypeError, match="A floating-point tensor must enter a head"):
        embedding(None)
