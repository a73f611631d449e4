"""Activation checkpointing is bit-identical, or an error that recommends an alternative."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from rotoopt import RotoGradOptimizer, RotoGradWeighting
from rotoopt._capture import first_weight
from tests.contract.models import TwoTasks, assert_same, back_propagate, sgd, snapshot, wrap

# The reason is given in test_compile.py.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

Forward = Callable[[TwoTasks, Tensor], Iterable[Tensor]]
Call = Callable[[RotoGradOptimizer, list[Tensor]], object]

recomputed: Any = partial(checkpoint, use_reentrant=False)
reentrant: Any = partial(checkpoint, use_reentrant=True)


def around(backbone: Any = None, heads: Any = None) -> Forward:
    """Return a forward pass with these kinds of checkpointing."""

    def forward(model: TwoTasks, x: Tensor) -> list[Tensor]:
        rep = model.backbone(x) if backbone is None else backbone(model.backbone, x)
        return [head(rep) if heads is None else heads(head, rep) for head in model.heads.values()]

    return forward


def in_segments(model: TwoTasks, x: Tensor) -> list[Tensor]:
    assert isinstance(model.backbone, nn.Sequential)
    rep = checkpoint_sequential(model.backbone, 2, x, use_reentrant=False)  # type: ignore[no-untyped-call]
    return [head(rep) for head in model.heads.values()]


def everything(kind: Any) -> Forward:
    return lambda model, x: kind(lambda x: tuple(model(x)), x)


def nested(model: TwoTasks, x: Tensor) -> Iterable[Tensor]:
    outputs: tuple[Tensor, ...] = recomputed(lambda x: tuple(around(heads=recomputed)(model, x)), x)
    return outputs


EXACT: dict[str, Forward] = {
    "backbone": around(backbone=recomputed),
    "heads": around(heads=recomputed),
    "backbone and heads": around(recomputed, recomputed),
    "segments": in_segments,
    "everything": everything(recomputed),
    "nested": nested,
    "re-entrant backbone": around(backbone=reentrant),
    "re-entrant backbone, heads": around(reentrant, recomputed),
}


def by_hand(optimizer: RotoGradOptimizer, losses: list[Tensor]) -> None:
    back_propagate(losses)
    optimizer.step()


def backward_then_step(optimizer: RotoGradOptimizer, losses: list[Tensor]) -> None:
    optimizer.backward(losses)
    optimizer.step()


CALLS: dict[str, Call] = {
    "step(losses)": lambda optimizer, losses: optimizer.step(losses),
    "backward(losses), step()": backward_then_step,
    "sum(losses).backward(), step()": by_hand,
    "step(closure)": lambda optimizer, losses: optimizer.step(lambda: back_propagate(losses)),
}


def run(forward: Forward, call: Call, *, autocast: bool = False, **options: Any) -> dict[str, Any]:
    model, optimizer = wrap(**options)
    for batch in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            x = model.inputs(batch).requires_grad_()  # re-entrant checkpointing of the backbone needs it
            losses = [output.square().mean() for output in forward(model, x)]
        optimizer.zero_grad()
        call(optimizer, losses)
    return snapshot(model, optimizer)


@pytest.mark.parametrize("call", ["step(losses)", "sum(losses).backward(), step()"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("where", EXACT)
def test_checkpointing_is_exact(where: str, autocast: bool, call: str) -> None:
    # If gradients are not collected, autograd sums them in its own order.
    expected = run(around(), CALLS[call], autocast=autocast, init="haar", weighting=RotoGradWeighting())
    found = run(EXACT[where], CALLS[call], autocast=autocast, init="haar", weighting=RotoGradWeighting())
    assert_same(found, expected)


def test_heads_run_again_in_the_backward_pass() -> None:
    """The assumption of the test above."""
    model, optimizer = wrap()
    runs: list[str] = []
    model.heads["left"].register_forward_pre_hook(lambda *_: runs.append("left"))
    losses = [output.square().mean() for output in around(heads=recomputed)(model, model.inputs(0))]
    assert runs == ["left"]
    optimizer.step(losses)
    assert runs == ["left", "left"]


@pytest.mark.parametrize("least", [0, first_weight.LEAST], ids=["weight is rotated", "input is rotated"])
def test_paused_forward_passes_of_which_heads_run_again_afterwards(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved must be the same: a checkpoint only compares shapes."""
    monkeypatch.setattr(first_weight, "LEAST", least)
    torch.manual_seed(0)
    backbone, heads = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 1)])
    bare = torch.optim.SGD([*backbone.parameters(), *heads.parameters()], lr=0.01)
    optimizer = RotoGradOptimizer(bare, list(heads), init="haar")
    x = torch.randn(15, 4)
    optimizer.step([head(backbone(x)).square().mean() for head in heads])
    expected: list[Any] = []
    found: list[Any] = []
    for head in heads:
        for grads, forward in ((expected, head), (found, partial(recomputed, head))):
            with optimizer.paused():
                loss = forward(backbone(x)).square().mean()
            grads.append(torch.autograd.grad(loss, [*backbone.parameters(), *head.parameters()]))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch scripts its decompositions
def test_forward_mode_under_paused() -> None:
    model, optimizer = wrap(init="haar")
    x, head = model.inputs(0), model.heads["left"]
    optimizer.step([output.square().mean() for output in around()(model, x)])
    z, tangent = (model.backbone(x).detach().requires_grad_() for x in (model.inputs(1), model.inputs(2)))
    autograd: Any = torch.autograd
    with optimizer.paused(), autograd.forward_ad.dual_level():
        output = head(autograd.forward_ad.make_dual(z, tangent))
        found = autograd.forward_ad.unpack_dual(output).tangent
    with optimizer.paused():
        _, expected = autograd.functional.jvp(head, z, tangent)
    torch.testing.assert_close(found, expected)


def test_functional_heads() -> None:
    results = []
    for kind in (None, recomputed):
        model, optimizer = wrap(num_tasks=2, init="haar")

        def forward(x: Tensor, model: TwoTasks = model, optimizer: Any = optimizer) -> tuple[Tensor, ...]:
            reps = optimizer.rotate(model.backbone(x))
            return tuple(head(rep) for head, rep in zip(model.heads.values(), reps, strict=True))

        for batch in range(3):
            x = model.inputs(batch)
            outputs = forward(x) if kind is None else kind(forward, x)
            optimizer.zero_grad()
            optimizer.step([output.square().mean() for output in outputs])
        results.append(snapshot(model, optimizer))
    assert_same(*results)


class Checkpointed(TwoTasks):
    """A model that recomputes its heads, as an option of a model zoo does."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(around(recomputed, recomputed)(self, x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_checkpointing_in_a_compiled_model(backend: str) -> None:
    results = []
    for compile_it in (True, False):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Checkpointed()
        optimizer = RotoGradOptimizer(sgd(model.parameters()), model.heads)
        forward = torch.compile(model, backend=backend) if compile_it else model
        for batch in range(3):
            outputs = forward(model.inputs(batch))
            optimizer.zero_grad()
            optimizer.step([output.square().mean() for output in outputs])
        results.append(snapshot(model, optimizer))
    torch.compiler.reset()
    assert_same(*results)


REFUSED: dict[str, Forward] = {
    "re-entrant heads": around(heads=reentrant),
    "backbone, re-entrant heads": around(recomputed, reentrant),
    "re-entrant backbone and heads": around(reentrant, reentrant),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("where", REFUSED)
def test_reentrant_checkpointing_of_heads_is_rejected(where: str, call: str) -> None:
    model, optimizer = wrap(rotation_size=6)
    before = snapshot(model, optimizer)
    losses = [output.square().mean() for output in REFUSED[where](model, model.inputs(0).requires_grad_())]
    with pytest.raises(RuntimeError, match=r"re-entrant checkpointing.* \(?pass use_reentrant=False"):
        CALLS[call](optimizer, losses)
    after = snapshot(model, optimizer)
    for state in (before, after):  # a failed backward pass leaves gradients behind, and the heads have run in it
        del state["gradients"], state["optimizer"]["rotograd"]["places"]
    assert_same(after, before)


def test_reentrant_checkpointing_of_everything() -> None:
    """The graph of the losses does not contain the heads; a nested backward pass computes everything."""
    forward, call = everything(reentrant), "sum(losses).backward(), step()"
    assert_same(run(forward, CALLS[call]), run(around(), CALLS[call]))
    with pytest.raises(RuntimeError, match=r"passes through: none.*re-entrant checkpointing"):
        run(forward, CALLS["step(losses)"])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda z: z[:, 1:],
    "expanded": lambda z: z[:, :1].expand(-1, 3, -1),
    "transposed": lambda z: z.mT.contiguous().mT,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_first_forward_pass_uses_the_strides_of_later_ones(view: Callable[[Tensor], Tensor]) -> None:
    """Layers choose their operations by strides, and checkpointing checks what they have saved."""
    results = []
    for run in (recomputed, lambda function, x: function(x)):
        torch.manual_seed(0)
        backbone, tokens, pooled = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)
        model = nn.ModuleList([backbone, tokens, pooled])
        optimizer = RotoGradOptimizer(sgd(model.parameters()), heads=[tokens, pooled], rotate=False)

        def outputs(x: Tensor, backbone: Any = backbone, tokens: Any = tokens, pooled: Any = pooled) -> Any:
            z = backbone(x)
            return tokens(view(z)), pooled(z.mean(1))

        for _ in range(2):
            losses = [out.square().mean() for out in run(outputs, torch.randn(5, 6, 3))]
            optimizer.zero_grad()
            optimizer.step(losses)
        results.append(snapshot(model, optimizer))
    assert_same(*results)
