"""Intermediate layers: the right outputs with the right names, and an unchanged model."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from rotoopt.regularization import IntermediateLayerGetter
from tests.contract.models import assert_same
from tests.samplers import SEEDS

compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Network(nn.Module):
    """A stem followed by an in-place operation, an optional part, one that runs twice, and a head."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=inplace))
        self.optional = nn.Identity()
        self.twice = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4)
        self.head = nn.Linear(4, 2)
        self.number = 3

    def forward(self, x: Tensor, *, optional: bool = False) -> Tensor:
        h = self.stem(x)
        if optional:
            h = self.optional(h)
        h = self.twice(self.twice(h))
        h, _ = self.lstm(h)
        result: Tensor = self.head(h)
        return result


def network(*, inplace: bool = False) -> Network:
    torch.manual_seed(0)
    return Network(inplace=inplace)


def assert_no_hooks(model: nn.Module) -> None:
    assert [name for name, module in model.named_modules() if module._forward_hooks] == []


@given(names=st.permutations(["stem", "stem.0", "stem.1", "lstm", "head", ""]), seed=SEEDS)
def test_outputs_are_those_of_the_layers_in_the_order_of_their_names(names: list[str], seed: int) -> None:
    model, x = network(), torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    maps, output = IntermediateLayerGetter(model, names)(x)
    assert list(maps) == names
    stem = model.stem(x)
    lstm = model.lstm(model.twice(model.twice(stem)))
    expected = {"stem": stem, "stem.0": model.stem[0](x), "stem.1": stem, "lstm": lstm, "head": model(x), "": model(x)}
    assert_same(dict(maps), expected)
    assert_same(output, model(x))
    assert maps[""] is output
    assert_no_hooks(model)


def test_outputs_are_in_the_graph_of_the_model() -> None:
    model, x = network(), torch.randn(5, 3)
    maps, output = IntermediateLayerGetter(model, ["stem.0"])(x)
    torch.autograd.backward([maps["stem.0"].sum(), output.sum()])
    found = model.stem[0].weight.grad
    model.zero_grad()
    torch.autograd.backward([model.stem[0](x).sum(), model(x).sum()])
    torch.testing.assert_close(found, model.stem[0].weight.grad)


def test_output_of_the_model_can_be_left_out() -> None:
    maps, output = IntermediateLayerGetter(network(), ["head"], False)(torch.randn(5, 3))
    assert output is None
    assert maps["head"].shape == (5, 2)


def test_arguments_are_passed_on() -> None:
    maps, _ = IntermediateLayerGetter(network(), ["optional"])(x=torch.randn(5, 3), optional=True)
    assert maps["optional"].shape == (5, 4)


def fails(getter: IntermediateLayerGetter) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        getter(torch.randn(5, 7))


def skips(getter: IntermediateLayerGetter) -> None:
    message = (
        r"Every layer must run in the forward pass, got optional, which did not.* model uses its forward\(\) or its"
        r".*: run it through the getter first, or call torch\.compiler\.reset\(\)\.$"
    )
    with pytest.raises(RuntimeError, match=message):
        getter(torch.randn(5, 3))


def repeats(getter: IntermediateLayerGetter) -> None:
    message = r"must run once .*, got twice, which ran 2 times. .* a separate module, such as nn.Identity\(\)"
    with pytest.raises(RuntimeError, match=message):
        getter(torch.randn(5, 3))


def is_interrupted(getter: IntermediateLayerGetter) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with getter._model.get_submodule("head").register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        getter(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("call", "name"), [(fails, "head"), (skips, "optional"), (repeats, "twice"), (is_interrupted, "head")]
)
def test_hooks_are_removed_after_an_error(call: Callable[[IntermediateLayerGetter], None], name: str) -> None:
    model = network()
    getter = IntermediateLayerGetter(model, ["stem", name, "lstm"])
    for _ in range(2):
        call(getter)
        assert_no_hooks(model)


def test_hooks_are_removed_when_a_layer_disappears() -> None:
    model = network()
    getter = IntermediateLayerGetter(model, ["stem", "head"])
    del model.head
    with pytest.raises(AttributeError, match="head"):
        getter(torch.randn(5, 3))
    assert_no_hooks(model)


def test_layers_that_are_replaced_are_found() -> None:
    model = network()
    getter = IntermediateLayerGetter(model, ["head"])
    model.head = nn.Linear(4, 9)
    assert getter(torch.randn(5, 3))[0]["head"].shape == (5, 9)


def test_other_hooks_are_kept_and_run_first() -> None:
    model, x = network(), torch.randn(5, 3)
    expected = model(x) + 1
    model.head.register_forward_hook(lambda module, args, output: output + 1)
    maps, output = IntermediateLayerGetter(model, ["head"])(x)
    assert maps["head"] is output
    assert_same(output, expected)
    assert len(model.head._forward_hooks) == 1


def test_output_that_was_changed_in_place_is_rejected() -> None:
    with pytest.raises(RuntimeError, match=r"must not be changed in place, got that of stem.0, .* pass clone=True"):
        IntermediateLayerGetter(network(inplace=True), ["stem.0"])(torch.randn(5, 3))


@pytest.mark.parametrize("mode", ["clone", "inference"])
def test_output_is_that_from_before_a_change_in_place(mode: str) -> None:
    model, x = network(inplace=True), torch.randn(50, 3)
    with torch.inference_mode(mode == "inference"):
        maps, _ = IntermediateLayerGetter(model, ["stem.0"], clone=mode == "clone")(x)
        assert_same(maps["stem.0"], model.stem[0](x))
    assert maps["stem.0"].min() < 0


def test_output_is_not_copied_without_need() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    x = torch.randn(5, 3)
    maps, _ = IntermediateLayerGetter(model, ["0"])(x)
    assert maps["0"] is x


def test_copies_get_the_outputs_of_their_own_model() -> None:
    model, x = network(), torch.randn(5, 3)
    getter = IntermediateLayerGetter(model, ["stem", "head"], clone=True)
    expected, _ = getter(x)
    for copied_model, copied in (copy.deepcopy((model, getter)), pickle.loads(pickle.dumps((model, getter)))):
        assert_same(copied(x)[0], expected)
        nn.init.zeros_(copied_model.head.weight)
        assert not torch.equal(copied(x)[0]["head"], expected["head"])
        assert_same(getter(x)[0], expected)


def test_two_getters_on_one_model() -> None:
    model, x = network(), torch.randn(5, 3)
    outer = IntermediateLayerGetter(model, ["head"])
    inner = IntermediateLayerGetter(model, ["head"])
    assert_same(outer(x)[0], inner(x)[0])


def test_names_are_those_without_data_parallel() -> None:
    model, x = network(), torch.randn(5, 3)
    maps, _ = IntermediateLayerGetter(nn.DataParallel(model), ["stem.0", "head"])(x)
    assert_same(dict(maps), {"stem.0": model.stem[0](x), "head": model(x)})


class Compilable(nn.Module):
    """Convolution, in-place operation and head: compiles into one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(x))
        return result


def whole(model: Compilable, backend: Any) -> nn.Module:
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    assert isinstance(compiled, nn.Module)
    return compiled


def in_place(model: Compilable, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def in_part(model: Compilable, backend: Any) -> nn.Module:
    model.body = torch.compile(model.body, backend=backend)  # type: ignore[assignment]
    return model


@compiles
@pytest.mark.parametrize("compiled", [whole, in_place, in_part])
def test_compiled_model(compiled: Callable[[Compilable, Any], nn.Module]) -> None:
    """As in training with evaluations in between: outputs are correct, and each mode is compiled once."""
    model, x = Compilable(), torch.randn(50, 3)
    plain, counter = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    wrapped = compiled(model, counter)
    getter = IntermediateLayerGetter(wrapped, ["head", "body.0"])
    for _ in range(4):
        maps, output = getter(x)
        assert_same(dict(maps), {"head": plain(x), "body.0": plain.body[0](x)})
        torch.autograd.backward([output.sum(), maps["body.0"].square().sum()])
        wrapped.eval()
        with torch.no_grad():
            assert_same(wrapped(x), plain(x))
        wrapped.train()
    assert counter.frame_count == 2
    torch.autograd.backward([plain(x).sum(), plain.body[0](x).square().sum()])
    for param, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(param.grad, 4 * expected.grad)


@compiles
def test_compiled_model_that_ran_before_is_not_silently_empty() -> None:
    model: Any = torch.compile(Compilable(), backend="aot_eager")
    x = torch.randn(5, 3)
    model(x)
    getter = IntermediateLayerGetter(model, ["body.0"])
    message = r"model is compiled, and ran in the same mode .* run it through the getter .* torch.compiler.reset\(\)"
    with pytest.raises(RuntimeError, match=message):
        getter(x)
    torch.compiler.reset()
    assert getter(x)[0]["body.0"].shape == (5, 4)


BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "misspelt": (
        ValueError,
        r"`return_layers` must name layers of the model, got 'stem.O'. Did you mean stem.1 or stem.0 or stem\?",
        lambda: IntermediateLayerGetter(network(), ["head", "stem.O"]),
    ),
    "unknown": (
        ValueError,
        r"got 'transformer'. See model.named_modules\(\)",
        lambda: IntermediateLayerGetter(network(), ["transformer"]),
    ),
    "no module": (
        ValueError,
        "must name layers of the model, got 'number'",
        lambda: IntermediateLayerGetter(network(), ["number"]),
    ),
    "parameter": (ValueError, "got 'head.weight'", lambda: IntermediateLayerGetter(network(), ["head.weight"])),
    "twice": (
        ValueError,
        r"must name at least one layer, and each once, got \['head', 'head'\]",
        lambda: IntermediateLayerGetter(network(), ["head", "head"]),
    ),
    "none": (ValueError, r"and each once, got \[\]", lambda: IntermediateLayerGetter(network(), [])),
    "string": (
        TypeError,
        "`return_layers` must be a list of names, got the string 'head'",
        lambda: IntermediateLayerGetter(network(), "head"),
    ),
    "function": (
        TypeError,
        "`model` must be a module, got a method",
        lambda: IntermediateLayerGetter(network().forward, ["head"]),  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_names_are_rejected(name: str) -> None:
    error, message, build = BAD[name]
    with pytest.raises(error, match=message):
        build()
