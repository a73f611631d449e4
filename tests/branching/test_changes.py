"""Changes during training, and heads that change their inputs: correct, or an error."""

from __future__ import annotations

from collections.abc import Iterable
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


@pytest.mark.parametrize("own", [False, True])
def test_parameters_of_a_head_that_are_passed_to_it_get_its_own_gradient(own: bool) -> None:
    """An embedding of the labels, a query: these are not shared. Also in a run that is resumed, and evaluated."""
    torch.manual_seed(0)
    backbone, embedding = nn.Linear(5, 6), nn.Embedding(3, 6)

    def read(layers: nn.ModuleDict, z: Tensor, extra: Tensor) -> Tensor:
        out: Tensor = layers["out"](z * extra)
        return out

    heads = nn.ModuleDict({"a": Call(read, out=nn.Linear(6, 2), embedding=embedding), "b": nn.Linear(6, 2)})
    params = [*backbone.parameters(), *heads.parameters()]
    optimizer = RotoGradOptimizer(SGD(params, lr=1e-3), heads, init="haar")
    for step in range(6):
        if step == 3:
            state = optimizer.state_dict()
            optimizer.remove()
            optimizer = RotoGradOptimizer(SGD(params, lr=1e-3), heads, init="haar")
            optimizer.load_state_dict(state)
        z = backbone(torch.randn(4, 5))
        labels = torch.arange(4) % 3
        losses = [100 * heads["a"](z, embedding(labels)).square().mean(), heads["b"](z).square().mean()]
        R = optimizer.rotations[0] if len(optimizer.rotations.matrices) else torch.eye(6)
        out = heads["a"].layers["out"]  # type: ignore[index]
        assert isinstance(out, nn.Linear)
        same = 100 * out((z.detach() @ R.mT) * (embedding(labels) @ R.mT)).square().mean()
        (expected,) = torch.autograd.grad(same, embedding.weight)
        assert_close(losses[0], same)
        with torch.no_grad():
            heads["a"].eval()
            assert_close(100 * heads["a"](z, embedding(labels)).square().mean(), losses[0])
            heads["a"].train()
        optimizer.zero_grad()
        back_propagate(losses) if own else optimizer.backward(losses)
        assert_close(embedding.weight.grad, expected)
        optimizer.step()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("frozen", [range(5), range(2, 20)], ids=["from the start", "later"])
@pytest.mark.filterwarnings("ignore:The representation should require grad")
def test_a_backbone_that_was_frozen_behind_prompts_is_weighted_again_immediately(frozen: range, own: bool) -> None:
    """While it is frozen, the gradient at the input of a head only reaches the prompt of its task."""
    torch.manual_seed(0)
    backbone, heads = nn.Linear(5, 6), nn.ModuleList(nn.Linear(6, 2) for _ in range(2))
    prompts = nn.ParameterList(torch.randn(5) for _ in range(2))
    params = [*backbone.parameters(), *heads.parameters(), *prompts]
    parts = [(head, prompt) for head, prompt in zip(heads, prompts, strict=True)]
    optimizer = RotoGradOptimizer(SGD(params, lr=1e-3), parts, rotate=False)
    x = torch.randn(8, 5)

    def losses() -> list[Tensor]:
        outputs = [head(backbone(x + prompt)) for head, prompt in zip(heads, prompts, strict=True)]
        return [30**k * (output - 1).square().mean() for k, output in enumerate(outputs)]

    for step in range(frozen.stop + 2):
        backbone.requires_grad_(step not in frozen)
        optimizer.zero_grad()
        if step in frozen:
            back_propagate(losses()) if own else optimizer.backward(losses())
        else:
            with optimizer.paused():
                true = [torch.autograd.grad(loss, backbone.weight)[0] for loss in losses()]
            back_propagate(losses()) if own else optimizer.backward(losses())
            weights = optimizer.last_step.weights  # type: ignore[union-attr]
            assert_close(backbone.weight.grad, weights[0] * true[0] + weights[1] * true[1])
        optimizer.step()


class Decoder(nn.Module):
    """Reads its own output, and features."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(12, 6)

    def forward(self, query: Tensor, features: Tensor) -> Tensor:
        output: Tensor = self.out(torch.cat([query, features], 1)).tanh()
        return output


def decoded(decoder: nn.Module, z: Tensor, num_steps: int) -> Tensor:
    query = torch.zeros_like(z)
    for _ in range(num_steps):
        query = decoder(query, z)
    return query


@pytest.mark.parametrize("num_steps", [2, 3])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("init", ["identity", "haar"])
@pytest.mark.filterwarnings("ignore:The representation should require grad")
def test_a_backbone_may_be_frozen_first_if_a_head_reads_its_own_output(num_steps: int, own: bool, init: Any) -> None:
    """While it is frozen, only what the head has computed itself requires grad."""
    torch.manual_seed(0)
    backbone, decoder, other = nn.Linear(5, 6), Decoder(), nn.Linear(6, 2)
    params = nn.ModuleList([backbone, decoder, other]).parameters()
    options: dict[str, Any] = {"init": init, "rotation_lr": 0.3, "turn_every": 1}
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), [decoder, other], **options)

    def losses(of_decoder: nn.Module, rotated: Tensor, z: Tensor) -> list[Tensor]:
        return [decoded(of_decoder, rotated, num_steps).square().mean(), other(z).square().mean()]

    for step in range(5):
        backbone.requires_grad_(step >= 2)
        x, plain = torch.randn(4, 5), Decoder()
        plain.load_state_dict(decoder.state_dict())
        turns = init == "identity" and optimizer.rotations.size is not None
        z = backbone(x)
        loss = losses(plain, z @ optimizer.rotations[0].mT if turns else z, z)[0]
        true = torch.autograd.grad(loss, plain.out.weight)[0]
        optimizer.zero_grad()
        z = backbone(x)
        back_propagate(losses(decoder, z, z)) if own else optimizer.backward(losses(decoder, z, z))
        assert_close(decoder.out.weight.grad, true)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:The representation should require grad")
def test_an_aggregator_does_not_weight_what_a_head_reads_of_its_own_output_behind_a_frozen_backbone() -> None:
    backbone, decoder, other = nn.Linear(5, 6).requires_grad_(False), Decoder(), nn.Linear(6, 2)
    params = nn.ModuleList([decoder, other]).parameters()
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), [decoder, other], weighting=lambda grads: 3 * grads.sum(0))
    z, plain = backbone(torch.randn(4, 5)), Decoder()
    plain.load_state_dict(decoder.state_dict())
    back_propagate([decoded(plain, z, 2).square().mean()])
    optimizer.backward([decoded(decoder, z, 2).square().mean(), other(z).square().mean()])
    assert_close(decoder.out.weight.grad, plain.out.weight.grad)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.filterwarnings("ignore:The representation should require grad")
def test_a_shared_parameter_that_enters_after_prompts_is_weighted_immediately(own: bool) -> None:
    torch.manual_seed(0)
    shared, heads = nn.Parameter(torch.randn(8, 6)), nn.ModuleList(nn.Linear(6, 2) for _ in range(2))
    prompts = nn.ParameterList(torch.randn(8, 6) for _ in range(2))
    parts = [(head, prompt) for head, prompt in zip(heads, prompts, strict=True)]
    optimizer = RotoGradOptimizer(SGD([shared, *heads.parameters(), *prompts], lr=1e-3), parts, rotate=False)

    def losses(entering: Iterable[Tensor]) -> list[Tensor]:
        outputs = [head(z) for head, z in zip(heads, entering, strict=True)]
        return [30**k * (output - 1).square().mean() for k, output in enumerate(outputs)]

    for entering in (prompts, prompts, [shared, shared]):
        optimizer.zero_grad()
        with optimizer.paused():
            true = [torch.autograd.grad(loss, shared, allow_unused=True)[0] for loss in losses(entering)]
        back_propagate(losses(entering)) if own else optimizer.backward(losses(entering))
        optimizer.step()
    weights = optimizer.last_step.weights  # type: ignore[union-attr]
    assert weights[0] > weights[1]  # of a loss that is 30 times smaller
    assert_close(shared.grad, weights[0] * true[0] + weights[1] * true[1])


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


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 2])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("weighting", [None, torch.Tensor.sum], ids=["default", "aggregator"])
@pytest.mark.filterwarnings("ignore:The representation should require grad")
def test_a_forward_pass_before_the_backbone_is_frozen_has_no_effect(
    weighting: Any, kept: bool, num_tasks: int, own: bool
) -> None:
    """A forward pass to infer shapes, whose outputs may still exist; then only the heads are trained at first."""
    model, optimizer = wrap(weighting=weighting)
    outputs = model(model.inputs(0))
    if not kept:
        del outputs
    model.backbone.requires_grad_(False)
    for batch in range(3):
        before = [param.detach().clone() for param in model.heads.parameters()]
        losses = model.losses(batch)[0][:num_tasks]
        optimizer.zero_grad()
        back_propagate(losses) if own else optimizer.backward([*losses, *[None] * (2 - num_tasks)])
        optimizer.step()
        changed = [not torch.equal(*pair) for pair in zip(before, model.heads.parameters(), strict=True)]
        assert sum(changed) == num_tasks * len(changed) // 2


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("transform", [None, nn.Tanh()])
def test_a_tied_weight_gets_a_gradient_of_each_kind(transform: nn.Module | None, own: bool) -> None:
    """As two layers that are not tied: plain where the head uses it, weighted where the backbone does."""
    torch.manual_seed(0)
    embedding, words, other = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False), nn.Linear(6, 2)
    words.weight = embedding.weight
    heads = [words if transform is None else (transform, words), other]
    optimizer = RotoGradOptimizer(SGD([embedding.weight, *other.parameters()], lr=1e-3), heads, rotate=False)
    first: Any = nn.Identity() if transform is None else transform
    ids = torch.arange(5)

    def losses(z: Tensor, output: Tensor) -> list[Tensor]:
        read = z if transform is None else z.tanh()
        return [F.cross_entropy(F.linear(read, output), ids), 30 * F.linear(z, *other.parameters()).square().mean()]

    for step in range(3):
        z = embedding(ids)
        output = embedding.weight.detach().requires_grad_()
        true = losses(z, output)
        grads = [torch.autograd.grad(loss, embedding.weight, retain_graph=True)[0] for loss in true]
        (plain,) = torch.autograd.grad(true[0], output)
        optimizer.zero_grad()
        z = embedding(ids)
        given = [F.cross_entropy(words(first(z)), ids), 30 * other(z).square().mean()]
        back_propagate(given) if own else optimizer.backward(given)
        weights = optimizer.last_step.weights  # type: ignore[union-attr]
        assert step == 0 or weights[0] > weights[1]
        assert_close(embedding.weight.grad, plain + weights[0] * grads[0] + weights[1] * grads[1])
        optimizer.step()


def test_a_tied_output_layer_that_is_not_listed_is_named() -> None:
    embedding, transform, words, other = nn.Embedding(5, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Linear(6, 2)
    words.weight = embedding.weight
    optimizer = RotoGradOptimizer(SGD([embedding.weight, *other.parameters()], lr=1e-3), [transform, other])
    z = embedding(torch.arange(5))
    with pytest.raises(RuntimeError, match="also for an output layer that shares its weight with an embedding"):
        optimizer.step([words(transform(z)).square().mean(), other(z).square().mean()])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_gates_in_front_of_heads_are_weighted_with_the_experts(listed: bool, own: bool) -> None:
    torch.manual_seed(0)
    experts, gates, towers = (
        nn.ModuleList(nn.Linear(5, 6) for _ in range(3)),
        nn.ModuleList(nn.Linear(5, 3) for _ in range(2)),
        nn.ModuleList(nn.Linear(6, 2) for _ in range(2)),
    )
    shared = [*experts.parameters(), *gates.parameters()]
    heads = [(tower, gate) if listed else tower for tower, gate in zip(towers, gates, strict=True)]
    optimizer = RotoGradOptimizer(SGD([*shared, *towers.parameters()], lr=1e-3), heads, rotate=False)
    x = torch.randn(4, 5)

    def losses() -> list[Tensor]:
        outputs = torch.stack([expert(x).tanh() for expert in experts], dim=1)
        mixed = [(gate(x).softmax(1)[:, :, None] * outputs).sum(1) for gate in gates]
        return [30**k * (tower(z) - 1).square().mean() for k, (tower, z) in enumerate(zip(towers, mixed, strict=True))]

    for _ in range(3):
        with optimizer.paused():
            true = [
                torch.autograd.grad(losses()[k], shared, allow_unused=True, materialize_grads=True) for k in range(2)
            ]
        optimizer.zero_grad()
        back_propagate(losses()) if own else optimizer.backward(losses())
        weights = optimizer.last_step.weights  # type: ignore[union-attr]
        for param, first, second in zip(shared, *true, strict=True):
            assert_close(param.grad, weights[0] * first + weights[1] * second)
        optimizer.step()
