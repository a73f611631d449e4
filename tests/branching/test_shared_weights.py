"""Parameters of several users: passed to a head, tied, or in gates in front of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt.testing._branching.model import Call
from tests.contract.models import back_propagate


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
