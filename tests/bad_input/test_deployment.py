"""fold() and refresh() if there is nothing to fold or refresh: an error, and nothing has changed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from rotoopt import RotoGradOptimizer
from tests.bad_input.cases import Case, check, parametrize
from tests.contract.models import TwoTasks, assert_same, back_propagate, snapshot, train, wrap

NO_FORWARD, NO_ROTATIONS, NO_LAYERS, COPY_WITHOUT = (
    f"^{re.escape(message)}$"
    for message in (
        "fold() must know the shape of the representation, got heads that did not run in training mode yet. Run one "
        "forward pass, also after loading a checkpoint: model.train(); model(x).",
        "fold() must find the rotations in front of the heads, got heads without. Either (a) fold() was called before, "
        "and the model is ready, or (b) remove() was called, and the model runs without rotations.",
        "fold() must be used with `heads`, got an optimizer with num_tasks=K. There are no layers to fold into: "
        "multiply by optimizer.rotations[k] in front of head k.",
        "`model_copy` must have rotations in front of its heads, got a module without. Either (a) the model was copied "
        "before the optimizer was built, or after remove() or fold(), or (b) its heads are functions that read "
        "optimizer.rotate(z), which is up to date.",
    )
)


def fold(model: TwoTasks, optimizer: RotoGradOptimizer) -> Callable[[], object]:
    return optimizer.fold


def refresh(model_copy: Callable[[], object]) -> Callable[[TwoTasks, RotoGradOptimizer], Callable[[], object]]:
    return lambda _, optimizer: lambda: optimizer.refresh(model_copy())  # type: ignore[arg-type]


def removed() -> nn.Module:
    model, optimizer = wrap()
    optimizer.remove()
    return model


def folded() -> nn.Module:
    model, optimizer = wrap()
    train(model, optimizer, 0)
    optimizer.fold()
    return model


def of_size(size: int) -> nn.Module:
    return wrap(rotation_size=size)[0]


def of_one_task() -> nn.Module:
    head = nn.Linear(6, 1)
    RotoGradOptimizer(SGD(head.parameters(), lr=0.1), [head])
    return head


FUNCTIONAL = {"num_tasks": lambda: 2, "rotation_size": lambda: 6}
CASES = {
    "fold before a forward pass": Case(RuntimeError, NO_FORWARD, fold, later=False),
    "fold rotations of a known size": Case(RuntimeError, NO_FORWARD, fold, {"rotation_size": lambda: 4}, later=False),
    "fold into functions": Case(RuntimeError, NO_LAYERS, fold, FUNCTIONAL),
    "refresh a plain model": Case(ValueError, COPY_WITHOUT, refresh(TwoTasks)),
    "refresh what was removed": Case(ValueError, COPY_WITHOUT, refresh(removed)),
    "refresh what was folded": Case(ValueError, COPY_WITHOUT, refresh(folded)),
    "refresh a state dict": Case(TypeError, "`model_copy` must be a module, got a dict", refresh(dict)),
    "refresh another size": Case(
        ValueError,
        "must be a copy of the model, with 2 rotations of 6 features, got one with 2 of 4",
        refresh(lambda: of_size(4)),
    ),
    "refresh another number": Case(
        ValueError, "must be a copy of the model, with 2 rotations of 6 features, got one with 1", refresh(of_one_task)
    ),
}


@parametrize(CASES)
def test_deployment(case: Case, steps: int) -> None:
    check(case, steps)


def test_refresh_before_the_rotations_exist() -> None:
    _, optimizer = wrap()
    with pytest.raises(RuntimeError, match="`rotations` must exist before they are read, got none"):
        optimizer.refresh(wrap()[0])


def test_fold_after_a_checkpoint_needs_a_forward_pass() -> None:
    model, optimizer = wrap(init="haar")
    train(model, optimizer, 0)
    resumed_model, resumed = wrap(init="haar")
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=NO_FORWARD):
        resumed.fold()
    for each_model, each in ((model, optimizer), (resumed_model, resumed)):
        each_model(each_model.inputs(0))
        each.fold()
    assert_same(resumed_model.state_dict(), model.state_dict())


@pytest.mark.parametrize("resumed", [False, True])
def test_fold_needs_a_forward_pass_of_every_head(resumed: bool) -> None:
    """Otherwise the rotation of a head that did not run would be lost."""
    model, optimizer = wrap(init="haar")
    if resumed:
        train(model, optimizer, 0)
        state = model.state_dict(), optimizer.state_dict()
        model, optimizer = wrap(init="haar")
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    z = model.backbone(model.inputs(0))
    model.heads["left"](z)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=NO_FORWARD):
        optimizer.fold()
    assert_same(snapshot(model, optimizer), before)
    model.heads["right"](z)
    expected = model(model.inputs(1))
    optimizer.fold()
    torch.testing.assert_close(model(model.inputs(1)), expected)


@pytest.mark.parametrize("first", ["fold", "remove"])
def test_rotations_are_folded_once(first: str) -> None:
    model, optimizer = wrap(init="haar")
    train(model, optimizer, 0)
    getattr(optimizer, first)()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=NO_ROTATIONS):
        optimizer.fold()
    losses, z = model.losses(1)
    with pytest.raises(RuntimeError, match=r"^Losses must be given before remove\(\) or fold\(\), got some afterwards"):
        optimizer.step(losses, z)
    assert_same(snapshot(model, optimizer), before)
    back_propagate(losses)
    optimizer.step()


def test_a_head_with_an_attribute_of_that_name() -> None:
    model, optimizer = wrap(init="haar")
    optimizer.remove()
    model.heads["right"] = nn.Sequential(nn.Tanh(), nn.Linear(6, 2))
    model.heads["right"].register_buffer("rotation", torch.ones(1))
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads, init="haar")
    train(model, optimizer, 0)
    with torch.no_grad():
        before = model(model.inputs(1)), snapshot(model, optimizer)
        with pytest.raises(
            RuntimeError, match=r"free to add a buffer `rotation` to right.*: rename it.*: an activation, a"
        ):
            optimizer.fold()
        assert_same((model(model.inputs(1)), snapshot(model, optimizer)), before)
    train(model, optimizer, 1)


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, but used
def test_quantization_of_a_wrapped_model_says_to_fold_it_first() -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model, optimizer = wrap()
    train(model, optimizer, 0)
    quantized = quantize(model.eval(), {nn.Linear})
    message = r"^A head must be the module .* got a \w*Linear with its hooks, .* Call optimizer\.fold\(\) first"
    with pytest.raises(RuntimeError, match=message):
        quantized(model.inputs(0))
    optimizer.fold()
    quantize(model.eval(), {nn.Linear})(model.inputs(0))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_fold_of_a_traced_head_changes_nothing() -> None:
    """It cannot hold a buffer, and its layers cannot be found."""
    torch.manual_seed(0)
    model = TwoTasks()
    traced = torch.jit.trace(nn.Sequential(nn.Linear(6, 2), nn.Tanh()), torch.ones(5, 6))  # type: ignore[no-untyped-call]
    heads = {"left": model.heads["left"], "norm": nn.LayerNorm(6), "right": traced}
    model.heads = nn.ModuleDict(heads)
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads, init="haar")
    x = model.inputs(0)
    z = model.backbone(x)
    optimizer.step([head(z).square().mean() for head in model.heads.values()])
    keys, before = list(model.state_dict()), [output.detach() for output in model(x)]
    message = r"buffer `rotation` to right, got a \w+ that takes none .*jit.trace.*: it does not run on z alone"
    with pytest.raises(RuntimeError, match=message):
        optimizer.fold()
    assert_same([output.detach() for output in model(x)], before)
    assert list(model.state_dict()) == keys
    del model.heads["right"]
    optimizer.zero_grad()
    z = model.backbone(x)
    optimizer.step([*(head(z).square().mean() for head in model.heads.values()), None])
