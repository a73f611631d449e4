"""An exported, traced or transformed model is the rotated model, and the optimizer does not change."""

import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from rotoopt import RotoGradOptimizer
from tests.contract.models import TwoTasks, assert_same, parameters, sgd, snapshot, train, wrap

# torch.jit is deprecated, and warns about every comparison of shapes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
UNMADE = "rotations must exist on the device of the model before it is exported, traced or transformed by torch.func"


def trained(**options: Any) -> tuple[TwoTasks, RotoGradOptimizer]:
    model, optimizer = wrap(init="haar", **options)
    train(model, optimizer, 0, 1)
    return model, optimizer


def noticed(optimizer: RotoGradOptimizer) -> tuple[object, ...]:
    """Return the state that a forward pass in training changes."""
    capture = optimizer._core.engine.capture
    return dict(capture.shapes), dict(capture.fed.tasks), len(capture.fed.forks), len(capture._forks)


Export = Callable[[nn.Module, Tensor], nn.Module]


def exported(model: nn.Module, x: Tensor, *, strict: bool = False) -> nn.Module:
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict).module()


def exported_strictly(model: nn.Module, x: Tensor) -> nn.Module:
    return exported(model, x, strict=True)


def saved(model: nn.Module, x: Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)), file)
    file.seek(0)
    return torch.export.load(file).module()


def traced(model: nn.Module, x: Tensor) -> nn.Module:
    result: nn.Module = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
    return result


CASES: dict[str, tuple[Export, str]] = {
    "export, eval()": (exported, "eval()"),
    "export, no_grad()": (exported, "no_grad()"),
    "export, train()": (exported, "train()"),
    "strict export, eval()": (exported_strictly, "eval()"),
    "strict export, no_grad()": (exported_strictly, "no_grad()"),
    "saved and loaded, eval()": (saved, "eval()"),
    "trace, eval()": (traced, "eval()"),
    "trace, no_grad()": (traced, "no_grad()"),
}


@pytest.mark.parametrize("rotation_size", [None, 4])
@pytest.mark.parametrize(("export", "mode"), CASES.values(), ids=CASES)
def test_exported_model_is_the_rotated_model(export: Export, mode: str, rotation_size: int | None) -> None:
    model, optimizer = trained(rotation_size=rotation_size)
    model.train(mode != "eval()")
    before, left_behind = snapshot(model, optimizer), noticed(optimizer)
    with torch.no_grad() if mode == "no_grad()" else nullcontext():
        result = export(model, model.inputs(5))
    assert noticed(optimizer) == left_behind
    assert_same(snapshot(model, optimizer), before)
    x = torch.cat([model.inputs(6), model.inputs(7)])  # another batch size
    with torch.no_grad():
        assert_same(list(result(x)), model(x))


def test_rotations_are_constants_of_the_program() -> None:
    model, optimizer = trained()
    program = torch.export.export(model.eval(), (model.inputs(5),))
    assert_same(list(program.constants.values()), [optimizer.rotations.matrices])
    assert list(program.state_dict) == list(model.state_dict())


def test_training_continues_after_export() -> None:
    runs = []
    for export_it in (True, False):
        model, optimizer = trained()
        if export_it:
            exported(model, model.inputs(5))
        train(model, optimizer, 2, 3)
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)


class Functional(nn.Module):
    """A model that calls ``optimizer.rotate``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tasks = TwoTasks()
        self.optimizer = RotoGradOptimizer(sgd(self.tasks.parameters()), num_tasks=2, rotation_size=6, init="haar")

    def forward(self, x: Tensor) -> list[Tensor]:
        reps = self.optimizer.rotate(self.tasks.backbone(x))
        return [head(rep) for head, rep in zip(self.tasks.heads.values(), reps, strict=True)]


def test_functional_heads() -> None:
    model = Functional()
    left_behind = noticed(model.optimizer)
    x = model.tasks.inputs(5)
    result = exported(model, x)
    assert noticed(model.optimizer) == left_behind
    with torch.no_grad():
        assert_same(list(result(x)), model(x))


Transform = Callable[[TwoTasks, Tensor], object]
TRANSFORMS: dict[str, Transform] = {
    "export": lambda model, x: exported(model.eval(), x),
    "export in training": lambda model, x: exported(model, x),
    "trace": lambda model, x: traced(model.eval(), x),
    "vmap": lambda model, x: vmap(model)(x),
    "grad": lambda model, x: grad(lambda x: model(x)[0].sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_rotations_must_exist_before(transform: Transform) -> None:
    model, optimizer = wrap(init="haar")
    with pytest.raises(RuntimeError, match=f"{UNMADE}.*: run it once before"):
        transform(model, model.inputs(0))
    assert optimizer.rotations.size is None
    with torch.no_grad():
        model(model.inputs(0))
    transform(model, model.inputs(0))
    model.train()
    train(model, optimizer, 0)


def test_script_needs_a_model_without_hooks() -> None:
    model, optimizer = trained()
    head = model.heads["left"]
    with pytest.raises(AttributeError, match=r"does not support the hooks of heads\. Call optimizer\.fold\(\) first"):
        torch.jit.script(head)
    optimizer.remove()
    x = torch.ones(2, 6)
    assert_same(torch.jit.script(head)(x), head(x))


def by_hand(optimizer: RotoGradOptimizer) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what the right head computes from its weight and a representation."""
    R = optimizer.rotations[1]
    return lambda weight, rep: rep @ R.mT @ weight.mT


def test_symbolic_tracing_needs_a_folded_model() -> None:
    model, optimizer = wrap()
    optimizer.remove()
    model.heads["left"] = nn.Sequential(nn.Linear(6, 2), nn.Tanh())  # torch.fx calls single layers as usual
    optimizer = RotoGradOptimizer(sgd(model.parameters()), model.heads, init="haar")
    train(model, optimizer, 0, 1)
    left_behind = noticed(optimizer)
    with pytest.raises(TypeError, match=r"got Proxy.*Before torch.fx traces a model, call optimizer.fold\(\)"):
        torch.fx.symbolic_trace(model)
    assert noticed(optimizer) == left_behind
    x = model.inputs(5)
    expected = model(x)
    optimizer.fold()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_functional_call_takes_other_parameters() -> None:
    model, optimizer = trained()
    weight, rep = torch.arange(12.0).view(2, 6), torch.ones(2, 6)
    output = functional_call(model.heads["right"], {"weight": weight}, rep)
    torch.testing.assert_close(output, by_hand(optimizer)(weight, rep))


def test_functional_call_trains_like_a_call() -> None:
    runs = []
    for functionally in (True, False):
        model, optimizer = wrap()
        for batch in range(3):
            rep = model.backbone(model.inputs(batch))
            outputs = [
                functional_call(head, {"weight": 1 * next(head.parameters())}, rep) if functionally else head(rep)
                for head in model.heads.values()
            ]
            optimizer.zero_grad()
            optimizer.step([output.square().mean() for output in outputs], rep)
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)


Derivative = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], object]
DERIVATIVES: dict[str, Derivative] = {
    "grad of a parameter": lambda f, weight, rep: grad(lambda weight: f(weight, rep).square().sum())(weight),
    "grad of the representation": lambda f, weight, rep: grad(lambda rep: f(weight, rep).square().sum())(rep),
    "vmap": lambda f, weight, rep: vmap(f, (None, 0))(weight, rep),
    "grad per sample": lambda f, weight, rep: vmap(grad(lambda *args: f(*args).square().sum()), (None, 0))(weight, rep),
    "jvp": lambda f, weight, rep: jvp(lambda rep: f(weight, rep), (rep,), (rep + 1,)),
    "jacrev": lambda f, weight, rep: jacrev(f, (0, 1))(weight, rep),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_transforms_apply_to_the_rotated_model(derivative: Derivative) -> None:
    """True derivatives, also in training mode: their purpose is unknown, so they are not weighted."""
    model, optimizer = trained()
    optimizer.zero_grad()
    head, rep = model.heads["right"], model.backbone(model.inputs(5)).detach()
    before, left_behind, record = snapshot(model, optimizer), noticed(optimizer), optimizer.last_step
    (weight,) = parameters(head)
    actual = derivative(lambda weight, rep: functional_call(head, {"weight": weight}, rep), weight, rep)
    torch.testing.assert_close(actual, derivative(by_hand(optimizer), weight, rep))
    assert noticed(optimizer) == left_behind
    assert optimizer.last_step is record
    assert_same(snapshot(model, optimizer), before)


def test_losses_of_transformed_heads_are_rejected() -> None:
    model, optimizer = trained()
    rep = model.backbone(model.inputs(2))
    losses = [vmap(head)(rep).square().mean() for head in model.heads.values()]
    with pytest.raises(RuntimeError, match=r"passes through: none.*torch.func.vmap\(\)"):
        optimizer.step(losses)
