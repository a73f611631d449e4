"""L2 and L2-SP: closed forms, a fixed start point, and parameters that match by name and shape."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from rotoopt.regularization import L2Regularization, SPRegularization
from tests.asserts import eps
from tests.contract.models import assert_same
from tests.regularization import oracle
from tests.samplers import DTYPES, SEEDS


class Network(nn.Module):
    """Convolution, normalization and a head, with parameters of all shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.fc: nn.Module = nn.Linear(3, 4)


class TwoLayers(nn.Module):
    """Two layers of the same shape, whose weights may be tied."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        if tied:
            self.second.weight = self.first.weight


def network(seed: int, dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(seed)
    return Network().to(dtype)


def gradients(penalty: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(penalty, params), strict=True))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def move(model: nn.Module, step: float = 0.1) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.add_(step * torch.randn_like(param))


@given(seed=SEEDS, dtype=DTYPES, scale=st.floats(-6, 6))
def test_l2_is_half_of_the_squared_norm(seed: int, dtype: torch.dtype, scale: float) -> None:
    model = network(seed, dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(10**scale)
    penalty = L2Regularization(model)()
    expected = torch.tensor(oracle.half_squared_norm(model.parameters()), dtype=dtype)
    assert_close(penalty, expected, rtol=20 * eps(dtype), atol=0.0)
    assert_same(gradients(penalty, model), parameters(model))


@given(seed=SEEDS, dtype=DTYPES, scale=st.floats(-6, 6))
def test_sp_is_half_of_the_squared_distance(seed: int, dtype: torch.dtype, scale: float) -> None:
    source, target = network(seed, dtype), network(seed + 1, dtype)
    with torch.no_grad():
        for start, param in zip(source.parameters(), target.parameters(), strict=True):
            param.copy_(start + 10**scale * torch.randn_like(start))
    differences = {name: now - parameters(source)[name] for name, now in parameters(target).items()}
    penalty = SPRegularization(source, target)()
    expected = torch.tensor(oracle.half_squared_norm(differences.values()), dtype=dtype)
    assert_close(penalty, expected, rtol=20 * eps(dtype), atol=0.0)
    assert_same(gradients(penalty, target), differences)


@given(seed=SEEDS, dtype=DTYPES)
def test_sp_and_its_gradient_are_zero_at_the_start(seed: int, dtype: torch.dtype) -> None:
    model = network(seed, dtype)
    penalty = SPRegularization(copy.deepcopy(model), model)()
    assert penalty.item() == 0.0
    assert not any(grad.any() for grad in gradients(penalty, model).values())


@pytest.mark.parametrize("regularizer", [L2Regularization, lambda model: SPRegularization(model, model)])
def test_first_and_second_derivatives_at_zero(regularizer: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Linear(2, 3, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    penalty, params = regularizer(model), tuple(model.parameters())
    assert torch.autograd.gradcheck(lambda *_: penalty(), params)
    assert torch.autograd.gradgradcheck(lambda *_: penalty(), params)
    (grad, _) = torch.autograd.grad(penalty(), params, create_graph=True)
    assert_same(torch.autograd.grad(grad.sum(), params[0])[0], torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("moved", ["source", "target", "the same"])
def test_start_point_does_not_change(moved: str) -> None:
    source = network(0)
    target = source if moved == "the same" else network(0)
    penalty = SPRegularization(source, target)
    start = parameters(source)
    move(source if moved == "source" else target)
    differences = [now - start[name] for name, now in parameters(target).items()]
    assert penalty().item() == pytest.approx(oracle.half_squared_norm(differences), rel=1e-14)
    assert penalty().item() > 0 or moved == "source"


def test_start_point_may_be_a_state_dict() -> None:
    source, target = network(0), network(1)
    expected = SPRegularization(source, target)()
    assert_same(SPRegularization(source.state_dict(), target)(), expected)


def test_resumed_penalty_keeps_its_start_point() -> None:
    model = network(0)
    penalty = SPRegularization(model, model)
    move(model)
    resumed_model = network(1)
    resumed_model.load_state_dict(model.state_dict())
    resumed = SPRegularization(resumed_model, resumed_model)
    assert resumed().item() == 0.0
    resumed.load_state_dict(penalty.state_dict())
    assert_same(resumed(), penalty())
    assert penalty().item() > 0.0


def test_state_dict_has_the_start_point_and_nothing_of_the_model() -> None:
    model = network(0)
    penalty = SPRegularization(model, model)
    start = {f"starting_point.{name.replace('.', '/')}": each for name, each in parameters(model).items()}
    assert_same(dict(penalty.state_dict()), start)
    assert L2Regularization(model).state_dict() == {}
    assert [*penalty.parameters(), *L2Regularization(model).parameters()] == []


def test_state_dict_of_another_model_is_rejected() -> None:
    penalty = SPRegularization(network(0), network(0))
    state = penalty.state_dict()
    state["starting_point.other"] = state.pop("starting_point.fc/bias")
    with pytest.raises(RuntimeError, match="Missing key"):
        penalty.load_state_dict(state)


def test_start_point_moves_with_the_penalty_and_not_the_model() -> None:
    source, target = network(0, torch.float32), network(0, torch.float32)
    penalty = SPRegularization(source, target)
    penalty.to("meta", torch.float64)
    assert {(buffer.device.type, buffer.dtype) for buffer in penalty.buffers()} == {("meta", torch.float64)}
    assert {(param.device.type, param.dtype) for param in target.parameters()} == {("cpu", torch.float32)}
    target.to("meta")
    assert penalty().device.type == "meta"


def test_start_point_is_created_on_the_device_of_the_target() -> None:
    penalty = SPRegularization(network(0), network(0).to("meta"))
    assert {buffer.device.type for buffer in penalty.buffers()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """300^2 overflows in float16, and 2^-12 is lost when bfloat16 numbers are added."""
    model = nn.Linear(64, 64, dtype=dtype)
    nn.init.constant_(model.weight, 300.0)
    penalties = [L2Regularization(model), SPRegularization({k: 0 * v for k, v in model.state_dict().items()}, model)]
    for penalty in penalties:
        value = penalty()
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(oracle.half_squared_norm(model.parameters()), rel=1e-6)
        value.backward()
        assert model.weight.grad is not None
        assert model.weight.grad.dtype == dtype
        assert (model.weight.grad == 300.0).all()
        model.weight.grad = None


def test_complex_parameters_count_with_their_absolute_values() -> None:
    model = nn.Linear(3, 2, dtype=torch.complex128)
    start = {name: param * (1 + 1j) for name, param in parameters(model).items()}
    assert L2Regularization(model)().item() == pytest.approx(oracle.half_squared_norm(model.parameters()))
    penalty = SPRegularization(start, model)()
    assert_close(gradients(penalty, model), {name: now - start[name] for name, now in parameters(model).items()})


def test_tied_parameters_count_once() -> None:
    model = TwoLayers(tied=True)
    expected = oracle.half_squared_norm([model.first.weight, model.first.bias, model.second.bias])
    assert L2Regularization(model)().item() == pytest.approx(expected, rel=1e-6)
    penalty = SPRegularization(model, model)
    with torch.no_grad():
        model.first.weight.add_(1.0)
    assert penalty().item() == pytest.approx(4.5, rel=1e-6)


def test_tied_source_has_both_names() -> None:
    source, target = TwoLayers(tied=True), TwoLayers(tied=False)
    differences = [layer.weight - source.first.weight for layer in (target.first, target.second)]
    differences += [target.first.bias - source.first.bias, target.second.bias - source.second.bias]
    assert SPRegularization(source, target)().item() == pytest.approx(oracle.half_squared_norm(differences), rel=1e-6)


def test_frozen_parameters_count_and_get_no_gradient() -> None:
    model = network(0)
    model.get_submodule("body").requires_grad_(False)
    penalty = L2Regularization(model)()
    assert penalty.item() == pytest.approx(oracle.half_squared_norm(model.parameters()))
    penalty.backward()
    assert model.get_submodule("body.0").get_parameter("weight").grad is None


def test_model_without_parameters() -> None:
    assert_same(L2Regularization(nn.ReLU())(), torch.zeros(()))


def test_excluded_parameters_have_no_start_point() -> None:
    source, target = network(0), network(1)
    target.fc = nn.Linear(3, 9, dtype=torch.float64)  # another head
    penalty = SPRegularization(source, target, exclude=["fc.*", "*.1.*", "*bias"])
    assert penalty.starting_point.names == ("body.0.weight",)
    difference = target.get_parameter("body.0.weight") - source.get_parameter("body.0.weight")
    assert penalty().item() == pytest.approx(oracle.half_squared_norm([difference]))


@pytest.mark.parametrize("wrapped", ["source", "target", "both", "a part", "data parallel"])
def test_names_are_those_without_compile(wrapped: str) -> None:
    source, target = network(0), network(1)
    expected = SPRegularization(source, target)()
    if wrapped == "a part":
        compiled_body: Any = torch.compile(target.body, backend="eager")
        target.body = compiled_body
    compiled_source: Any = torch.compile(source, backend="eager") if wrapped in ("source", "both") else source
    parallel = nn.DataParallel(target) if wrapped == "data parallel" else target
    compiled_target: Any = parallel if wrapped in ("source", "a part") else torch.compile(parallel, backend="eager")
    penalty = SPRegularization(compiled_source, compiled_target)
    assert_same(penalty(), expected)
    assert "starting_point.body/0/weight" in penalty.state_dict()


def test_data_parallel_has_the_names_of_its_module() -> None:
    source, target = network(0), network(1)
    expected = SPRegularization(source, target)()
    assert_same(SPRegularization(source, nn.DataParallel(target))(), expected)


def smaller(model: Network) -> Network:
    model.fc = nn.Linear(3, 1, dtype=torch.float64)  # would broadcast
    return model


def headless(model: Network) -> Network:
    model.fc = nn.Identity()
    return model


MODEL = network(0)
BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "missing": (
        ValueError,
        r"must have the parameters of `target_model`, .*got none for fc.weight, fc.bias. Either \(a\) pass .*"
        r", or \(b\) leave new layers out, as in exclude=\['fc\.\*'\]\.$",
        lambda: SPRegularization(headless(network(0)), MODEL),
    ),
    "broadcastable": (
        ValueError,
        r"in the same shapes, got fc.weight of \(1, 3\) for \(4, 3\), fc.bias of \(1,\) for \(4,\)",
        lambda: SPRegularization(smaller(network(0)), MODEL),
    ),
    "broadcastable the other way": (
        ValueError,
        r"got fc.weight of \(4, 3\) for \(1, 3\)",
        lambda: SPRegularization(MODEL, smaller(network(0))),
    ),
    "another architecture": (
        ValueError,
        "got none for body.0.weight",
        lambda: SPRegularization(nn.Linear(2, 2), MODEL),
    ),
    "useless pattern": (
        ValueError,
        r"`exclude` must match names of parameters, got \['head'\], which match none of \['body.0.weight'",
        lambda: SPRegularization(MODEL, MODEL, exclude=["*.bias", "head"]),
    ),
    "single pattern": (
        TypeError,
        "`exclude` must be a list of patterns, got the string 'fc.weight'",
        lambda: SPRegularization(MODEL, MODEL, exclude="fc.weight"),
    ),
    "nothing left": (
        ValueError,
        "^`target_model` must have parameters that are not excluded, got none",
        lambda: SPRegularization(MODEL, MODEL, exclude=["*"]),
    ),
    "no parameters": (ValueError, "must have parameters", lambda: SPRegularization(nn.ReLU(), nn.ReLU())),
    "no target": (
        TypeError,
        "`target_model` must be a module, got a OrderedDict",
        lambda: SPRegularization(MODEL, MODEL.state_dict()),  # type: ignore[arg-type]
    ),
    "no source": (
        TypeError,
        "`source_model` must be a module, got a list",
        lambda: SPRegularization([*MODEL.parameters()], MODEL),  # type: ignore[arg-type]
    ),
    "parameters": (
        TypeError,
        "`model` must be a module, got a generator",
        lambda: L2Regularization(MODEL.parameters()),  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_models_are_rejected(name: str) -> None:
    error, message, build = BAD[name]
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("change", [headless, smaller])
def test_parameters_that_change_later_are_rejected(change: Callable[[Network], Network]) -> None:
    target = network(0)
    penalty = SPRegularization(target, target)
    change(target)
    with pytest.raises(
        RuntimeError,
        match=r"must keep its parameters, got one in which fc.weight, fc.bias is missing or has another shape\. "
        r"Parametrize, prune or replace layers before building SPRegularization\.$",
    ):
        penalty()
