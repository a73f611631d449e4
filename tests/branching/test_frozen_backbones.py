"""Backbones that are frozen from the start or later, behind trained prompts or not: correct, or an error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from tests.contract.models import back_propagate, wrap


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
