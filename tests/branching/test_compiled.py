"""The wiring of a compiled model is checked, or a warning says that it cannot be."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt.testing import check_invariants
from rotoopt.weighting import EqualWeighting
from tests.contract.models import TwoTasks, back_propagate


class OneAfterAnother(nn.Module):
    """The second head reads a deeper tensor; the first one's loss or output may be computed, or used, on the way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(3, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleDict({"first": nn.Linear(6, 6), "second": nn.Linear(6, 2)})
        self.kind = kind

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.early(x).tanh()
        out = self.heads["first"](z)
        loss = (out - 1).square().mean() if "early loss" in self.kind else None
        deeper = self.late(z + out if "cascade" in self.kind else z)
        if self.kind == "skip":
            out = out + z
        second = 100 * self.heads["second"](deeper).square().mean()
        return [(out - 1).square().mean() if loss is None else loss, second]


@pytest.mark.parametrize(
    ("kind", "visible", "own"),
    [("", True, False), ("cascade", True, True), ("early loss", False, False), ("cascade, early loss", False, True)],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_wiring_that_is_compiled_is_checked_or_reported(kind: str, visible: bool, own: bool) -> None:
    model, x = OneAfterAnother(kind), torch.randn(4, 3)
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads)
    compiled = torch.compile(model, backend="aot_eager")
    raises = pytest.raises(RuntimeError, match="Heads must read the backbone, got second")
    warns = pytest.warns(UserWarning, match="The wiring must be visible in the autograd graph")
    with raises if visible and kind else nullcontext() if visible else warns:
        back_propagate(compiled(x)) if own else optimizer.backward(compiled(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_outputs_that_a_compiled_graph_joins_are_explained(compiles: bool) -> None:
    heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    backbone = nn.Linear(3, 3)
    optimizer = RotoGradOptimizer(SGD(nn.ModuleList([backbone, heads]).parameters(), lr=0.1), heads)

    def joined(x: Tensor) -> Tensor:
        z = backbone(x)
        first, second = heads[0](z), heads[1](z)
        return torch.cat([first, second], dim=1).tanh()

    out = torch.compile(joined, backend="aot_eager")(torch.randn(4, 3)) if compiles else joined(torch.randn(4, 3))
    told = pytest.raises(RuntimeError, match=r"as torch\.cat does, return them separately there")
    with told if compiles else nullcontext():
        optimizer.backward([out[:, :2].square().mean(), out[:, 2:].square().mean()])
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["sum", "sum with weights", "loss of one task"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_losses_may_be_added_up_in_a_compiled_function(kind: str) -> None:
    """Whether parameters in it weight losses or belong to a layer is not visible."""
    model, x = TwoTasks(), torch.randn(4, 3)
    plain = copy.deepcopy(model)
    factors = nn.Parameter(torch.full((2,), 3.0), requires_grad=kind == "sum with weights")
    params = [*model.parameters(), factors]
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), model.heads, weighting=EqualWeighting())

    def criterion(left: Tensor, right: Tensor) -> Tensor:
        return factors[0] * left.square().mean() + factors[1] * right.square().mean()

    loss = torch.compile(criterion, backend="aot_eager")(*model(x))
    rule = "outside of compiled graphs" if factors.requires_grad else "of right must be computed from the output"
    with nullcontext() if kind == "sum" else pytest.raises(RuntimeError, match=rule):
        optimizer.backward({"right": loss}) if kind == "loss of one task" else back_propagate([loss])
        back_propagate([criterion(*plain(x))])
        assert_close([p.grad for p in model.backbone.parameters()], [p.grad for p in plain.backbone.parameters()])
    torch._dynamo.reset()


class Update(nn.GRUCell):
    """Returns two tensors, so that its compiled graph is opaque."""

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = super().forward(z, h)
        return h, h.sum(1)


class Refined(nn.Module):
    """Calls a head on its own output; with ``starts_with_z``, first on the representation."""

    def __init__(self, *, starts_with_z: bool) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 6)
        self.heads = nn.ModuleDict({"refined": Update(6, 6), "other": nn.Linear(6, 2)})
        self.starts_with_z = starts_with_z

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.backbone(x).tanh()
        h, flow = 2 * z if self.starts_with_z else torch.zeros_like(z), torch.zeros(len(x))
        for _ in range(3):
            h, change = self.heads["refined"](z, h)
            flow = flow + change
        return [1e-2 * flow.square().mean(), self.heads["other"](z).square().mean()]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("starts_with_z", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_loop_that_calls_a_head_on_its_own_output_is_right_or_refused(
    starts_with_z: bool, own: bool
) -> None:
    model, x = Refined(starts_with_z=starts_with_z), torch.randn(4, 3)
    plain = copy.deepcopy(model)
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.0), model.heads, rotate=False)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match="or never, got one of refined") if starts_with_z else nullcontext():
        for _ in range(2):
            optimizer.zero_grad()
            back_propagate(compiled(x)) if own else optimizer.backward(compiled(x))
            optimizer.step()
        assert optimizer.last_step is not None
        losses = zip(optimizer.last_step.weights, plain(x), strict=True)
        expected = torch.autograd.grad(sum(weight * loss for weight, loss in losses), [*plain.backbone.parameters()])
        assert_close([p.grad for p in model.backbone.parameters()], [*expected])
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["early loss", "cascade, early loss", "skip"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The wiring must be visible in the autograd graph")
def test_gradients_tell_what_a_compiled_graph_hides(kind: str) -> None:
    model, x = OneAfterAnother(kind), torch.randn(4, 3)
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads)
    compiled = torch.compile(model, backend="aot_eager")
    wrong = pytest.raises(AssertionError, match="must be the sum of the task gradients, each times its weight")
    with nullcontext() if kind == "early loss" else wrong:
        check_invariants(optimizer, lambda: compiled(x))
    torch._dynamo.reset()


class Reverse(torch.autograd.Function):
    """Gradient reversal, as it is often written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clones: bool) -> Tensor:
        return x.clone() if clones else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -grad, None


@pytest.mark.parametrize("clones", [False, True])
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The wiring must be visible in the autograd graph")
def test_backward_that_torch_ignores_at_the_end_of_a_compiled_graph_is_found(clones: bool) -> None:
    """An output that is a view of another one is taken again from it, without the function in between."""
    model, x = TwoTasks(), torch.randn(4, 3)

    def forward(x: Tensor) -> list[Tensor]:
        z = model.backbone(x)
        reversed_z = Reverse.apply(z, clones)  # type: ignore[no-untyped-call]
        return [model.heads["left"](z).square().mean(), model.heads["right"](reversed_z).square().mean()]

    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads)
    compiled = torch.compile(forward, backend="aot_eager")
    raises = pytest.raises(AssertionError, match=r"must be the sum of the task gradients.*\(d\) the model is compiled")
    with nullcontext() if clones else raises:
        check_invariants(optimizer, lambda: compiled(x))
    torch._dynamo.reset()
