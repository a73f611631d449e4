"""After fold() a model needs no optimizer, and only its first layers have changed."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from rotoopt import RotoGradOptimizer
from rotoopt._capture.representation import RotatedDims
from rotoopt.testing._branching import BRANCHING
from rotoopt.testing._branching.model import Sizes, built, inputs
from tests.asserts import assert_reads_well, relative_error
from tests.branching.twins import NAMES
from tests.contract.models import REP_SIZE, TwoTasks, assert_same, snapshot, train
from tests.samplers import DTYPES, LAYOUTS, SEEDS, Layout, Network, batches, network

KEEPS = "Every head should begin with a linear layer"


@torch.no_grad()
def predict(model: Network | TwoTasks, x: Tensor) -> list[Tensor]:
    heads = model.heads.values() if isinstance(model.heads, nn.ModuleDict) else model.heads
    z = model.backbone(x)
    return [head(z) for head in heads]


def hooks(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]


@given(layout=st.sampled_from(LAYOUTS), K=st.integers(1, 4), rest=st.integers(0, 3), seed=SEEDS, dtype=DTYPES)
def test_state_dict_loads_into_a_plain_model(layout: Layout, K: int, rest: int, seed: int, dtype: torch.dtype) -> None:
    shape, dim = layout
    *data, (x, _) = batches(seed, 3, K, dtype)
    model, plain = network(seed, shape[1:], K, dtype), Network(shape[1:], K).to(dtype)
    size = RotatedDims(dim).size(torch.Size(shape)) - rest
    bare = SGD(model.parameters(), lr=0.1)
    optimizer = RotoGradOptimizer(
        bare, list(model.heads), dim=dim, rotation_size=size, rotation_lr=1.0, init="haar", rotate=[True] * K
    )
    for batch in data:
        optimizer.zero_grad()
        optimizer.step(*model.losses(batch))
    before, rotations = predict(model, x), optimizer.rotations.matrices.clone()
    generator = torch.get_rng_state()
    rest_of_it = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("1.weight")}
    optimizer.fold()
    assert not hooks(model)
    assert_same(torch.get_rng_state(), generator)
    assert_same({name: model.state_dict()[name] for name in rest_of_it}, rest_of_it)
    assert_same(optimizer.rotations.matrices, rotations)
    plain.load_state_dict(model.state_dict())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12  # largest measured, of 150 models: 3.2e-7 and 7.1e-16
    for after, expected in zip(predict(plain, x), before, strict=True):
        assert relative_error(after, expected) <= tolerance


class Normed(TwoTasks):
    """The left head begins with a norm and keeps its rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.heads["left"] = nn.Sequential(nn.BatchNorm1d(REP_SIZE), nn.Linear(REP_SIZE, 1))


def trained(model: TwoTasks, **options: Any) -> RotoGradOptimizer:
    options = {"init": "haar", "rotation_size": 4, **options}
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads, **options)
    train(model, optimizer, 0, 1)
    return optimizer


X = torch.ones(2, 3)


def test_only_the_heads_that_need_it_keep_their_rotation() -> None:
    model = Normed()
    optimizer = trained(model)
    before, keys = predict(model.eval(), X), list(model.state_dict())
    with pytest.warns(UserWarning, match=f"{KEEPS}.* do not. left: it begins with BatchNorm1d.*. They keep"):
        optimizer.fold()
    optimizer.rotations.matrices.zero_()  # the model is independent of it
    assert_same(predict(model, X)[0], before[0])
    torch.testing.assert_close(predict(model, X)[1], before[1])
    assert sorted(model.state_dict()) == sorted([*keys, "heads.left.rotation"])
    assert len(hooks(model)) == 1


@pytest.mark.parametrize(
    "options", [{"rotate": [False, True]}, {"rotate": False}, {"init": "identity", "rotation_lr": 0.0}]
)
def test_a_head_whose_rotation_was_never_updated_does_not_change(options: dict[str, Any]) -> None:
    model = Normed()
    optimizer = trained(model, **options)
    before, left = predict(model.eval(), X), copy.deepcopy(model.heads["left"].state_dict())
    optimizer.fold()
    assert_same(model.heads["left"].state_dict(), left)
    torch.testing.assert_close(predict(model, X), before)
    assert not hooks(model)


@pytest.mark.filterwarnings(f"ignore:{KEEPS}")
@pytest.mark.parametrize("name", NAMES)
def test_any_model_computes_what_it_did(name: str) -> None:
    model = built(BRANCHING[NAMES.index(name)], Sizes(), 0, torch.float64)
    bare = SGD(model.modules().parameters(), lr=0.01)
    optimizer = RotoGradOptimizer(bare, model.heads, init="haar", **model.options)
    optimizer.step(model.losses(inputs(0, 4, torch.float64)))
    model.modules().eval()

    @torch.no_grad()
    def losses() -> dict[str, Tensor]:
        torch.manual_seed(0)
        return model.losses(inputs(1, 4, torch.float64))

    before = losses()
    optimizer.fold()
    torch.testing.assert_close(losses(), before, rtol=1e-12, atol=0)  # largest measured: 1.9e-16


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "folds": lambda: nn.Linear(REP_SIZE, 2),
    "keeps": lambda: nn.Sequential(nn.LayerNorm(REP_SIZE), nn.Linear(REP_SIZE, 2)),
    "no parameters": nn.Tanh,
    "of another size": lambda: nn.Linear(REP_SIZE - 1, 2),
}


@settings(max_examples=10)  # searching every module of many heads takes time
@given(tasks=st.lists(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=3), min_size=2, max_size=3))
def test_every_module_of_a_head_separately(tasks: list[list[str]]) -> None:
    """Each rotation is folded, or kept and named, or did not exist."""
    torch.manual_seed(0)
    tasks = [["folds", *kinds] for kinds in tasks]  # z determines the rotations
    backbone, narrow = nn.Linear(3, REP_SIZE), nn.Linear(3, REP_SIZE - 1)
    heads = {f"task{k}": tuple(LAYERS[kind]() for kind in kinds) for k, kinds in enumerate(tasks)}
    parts = [(kind, part) for k, kinds in enumerate(tasks) for kind, part in zip(kinds, heads[f"task{k}"], strict=True)]

    def outputs() -> list[Tensor]:
        z, other = backbone(X), narrow(X)
        return [part(other if kind == "of another size" else z) for kind, part in parts]

    optimizer = RotoGradOptimizer(SGD(backbone.parameters(), lr=0.1), heads, init="haar")
    outputs()
    before, kept = outputs(), [kind in ("keeps", "no parameters") for kind, _ in parts]
    with pytest.warns(UserWarning, match=KEEPS) if any(kept) else nullcontext() as warnings:
        optimizer.fold()
    torch.testing.assert_close(outputs(), before)
    assert [hasattr(part, "rotation") for _, part in parts] == kept
    names = [f"task{k}[{number}]" for k, kinds in enumerate(tasks) for number in range(len(kinds))]
    message = str(warnings[0].message) if warnings else ""
    assert [f"{name}: " in message for name in names] == kept


def test_a_single_task_needs_no_forward_pass() -> None:
    model = TwoTasks()
    RotoGradOptimizer(SGD(model.parameters(), lr=0.1), [model.heads["left"]]).fold()
    assert not hooks(model)


@pytest.mark.filterwarnings("ignore:The representation should require grad")
@pytest.mark.parametrize("options", [{}, {"init": "haar"}, {"init": "haar", "rotation_size": 2}])
def test_heads_trained_behind_a_frozen_backbone(options: dict[str, Any]) -> None:
    model = TwoTasks()
    model.backbone.requires_grad_(False)
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads, **options)
    train(model, optimizer, 0, 1)
    before = predict(model.eval(), X)
    optimizer.fold()
    torch.testing.assert_close(predict(model, X), before)
    assert not hooks(model)


@pytest.mark.filterwarnings(f"ignore:{KEEPS}")
@pytest.mark.parametrize("hidden", [nn.Linear(REP_SIZE, REP_SIZE), nn.ReLU()])
def test_the_latest_batch_of_a_task_may_be_empty(hidden: nn.Module) -> None:
    model = TwoTasks()
    model.heads["left"] = nn.Sequential(hidden, nn.Tanh(), nn.Linear(REP_SIZE, 1))
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads, init="haar")
    z = model.backbone(model.inputs(0))
    optimizer.step([model.heads["left"](z[:0]).sum(), model.heads["right"](z).mean()])
    before = predict(model.eval(), X)
    optimizer.fold()
    torch.testing.assert_close(predict(model, X), before)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.filterwarnings(f"ignore:{KEEPS}")
@pytest.mark.parametrize("name", COPIES)
def test_copies(name: str) -> None:
    """Fold one of two copies, and copy the folded model."""
    model = Normed()
    optimizer = trained(model)
    folded, its_optimizer = COPIES[name]((model, optimizer))
    before, rest = predict(model.eval(), X), snapshot(model, optimizer)
    its_optimizer.fold()
    torch.testing.assert_close(predict(folded.eval(), X), before)
    assert_same(snapshot(model, optimizer), rest)
    assert_same(predict(model, X), before)
    assert_same(predict(COPIES[name](folded), X), predict(folded, X))


@pytest.mark.filterwarnings(f"ignore:{KEEPS}")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [TwoTasks, Normed])
def test_export(make: type[TwoTasks], strict: bool) -> None:
    model = make()
    trained(model).fold()
    exported = torch.export.export(model.eval(), (X,), strict=strict)
    assert exported.state_dict.keys() == model.state_dict().keys()
    torch.testing.assert_close(list(exported.module()(X)), predict(model, X))


@pytest.mark.filterwarnings(
    f"ignore:{KEEPS}", "ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_traced_operators_are_those_that_the_older_onnx_exporter_knows(wrapped: bool) -> None:
    """``torch.onnx.export(dynamo=False)`` rejects ``aten::mT``, unless its input is a constant."""
    model = Normed()
    optimizer = trained(model)
    if not wrapped:
        optimizer.fold()
    traced: Any = torch.jit.trace(model.eval(), X)  # type: ignore[no-untyped-call]
    assert "aten::mT" not in str(traced.inlined_graph)
    assert_same(list(traced(X)), predict(model, X))


@pytest.mark.filterwarnings(f"ignore:{KEEPS}")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile looks at it
@pytest.mark.parametrize("around", ["model", "heads", "heads in place"])
def test_compiled_models_and_heads(around: str) -> None:
    """Compiled code does not detect new hooks, hence the reset."""
    torch._dynamo.reset()  # its limit of compiled versions includes those of other tests
    counter: Any = CompileCounterWithBackend("eager")
    model = Normed()
    plain = list(model.heads.values())
    for name, head in model.heads.items():
        if around == "heads":
            model.heads[name] = cast(nn.Module, torch.compile(head, backend=counter))
        elif around == "heads in place":
            head.compile(backend=counter)
    optimizer = trained(model)
    compiled: Any = torch.compile(model, backend=counter) if around == "model" else model
    before, compilations = compiled.eval()(X), counter.frame_count
    optimizer.fold()
    assert counter.frame_count == compilations > 0
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(X), before)
    z = model.backbone(X)
    torch.testing.assert_close([head(z) for head in plain], before)


@pytest.mark.filterwarnings(f"ignore:{KEEPS}")
def test_heads_called_by_keyword() -> None:
    model = Normed()
    optimizer = trained(model)
    z = model.eval().backbone(X)
    before = [head(input=z) for head in model.heads.values()]
    optimizer.fold()
    torch.testing.assert_close([head(input=z) for head in model.heads.values()], before)


@pytest.mark.filterwarnings(f"ignore:{KEEPS}")
@pytest.mark.parametrize("other", [None, torch.tensor([True, False, True, False, True])])
def test_heads_called_without_an_input_of_training(other: Tensor | None) -> None:
    class Head(nn.Linear):
        def forward(self, z: Tensor, other: Tensor | None = None) -> Tensor:
            return super().forward(z if other is None else z * other)

    backbone, heads = nn.Linear(3, 5), nn.ModuleList([Head(5, 2), Head(5, 1)])
    optimizer = RotoGradOptimizer(SGD([*backbone.parameters(), *heads.parameters()], lr=0.1), list(heads), init="haar")
    z = backbone(torch.randn(4, 3))
    optimizer.step([head(z, z.tanh()).square().mean() for head in heads], z)
    z = z.detach()
    before = [head(z, other).detach() for head in heads.eval()]
    optimizer.fold()
    torch.testing.assert_close([head(z, other).detach() for head in heads], before)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_head_that_changes_its_input_in_place_is_named(num_steps: int) -> None:
    backbone, first = nn.Linear(3, 5), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 2))
    heads = nn.ModuleDict({"first": first, "second": nn.Linear(5, 1)})
    optimizer = RotoGradOptimizer(SGD([*backbone.parameters(), *heads.parameters()], lr=0.1), heads, rotate=False)
    for _ in range(num_steps):
        z = backbone(X)
        optimizer.step({name: head(z).square().mean() for name, head in heads.items()})
    with pytest.warns(UserWarning, match="change its input in place before fold.., got first. So far") as warned:
        optimizer.fold()
    assert_reads_well(str(warned[0].message))


@dataclass
class Scores:
    """What a head returns."""

    logits: Any
    name: str = "scores"


def test_heads_that_return_a_dataclass() -> None:
    class Head(nn.Linear):
        def forward(self, z: torch.Tensor) -> Any:
            return Scores({"main": super().forward(z)})

    backbone, heads = nn.Linear(3, 5), nn.ModuleList([Head(5, 2), Head(5, 1)])
    optimizer = RotoGradOptimizer(SGD([*backbone.parameters(), *heads.parameters()], lr=0.1), list(heads), init="haar")
    z = backbone(X)
    optimizer.step([head(z).logits["main"].square().mean() for head in heads], z)
    before = [head(z).logits["main"].detach() for head in heads.eval()]
    optimizer.fold()
    torch.testing.assert_close([head(z).logits["main"].detach() for head in heads], before)
    assert not hooks(heads)


def test_first_layer_of_two_heads() -> None:
    model = TwoTasks()
    shared = nn.Linear(REP_SIZE, 2)
    model.heads = nn.ModuleDict({"left": nn.Sequential(shared), "right": nn.Sequential(nn.Identity(), shared)})
    optimizer = trained(model)
    before = predict(model, X)
    with pytest.warns(UserWarning, match=f"{KEEPS}.*left: another head shares its first layer; right: another head"):
        optimizer.fold()
    assert_same(predict(model, X), before)


@pytest.mark.filterwarnings(f"ignore:{KEEPS}")
def test_context_does_not_matter() -> None:
    results = []
    for context in (nullcontext(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        torch.manual_seed(0)
        model = Normed()
        optimizer = trained(model)
        with context:
            optimizer.fold()
        assert not any(value.is_inference() for value in model.state_dict().values())
        results.append(copy.deepcopy(model.state_dict()))
    assert_same(results[1:], results[:1] * 2)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group that consists of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    gc.collect()  # a reducer that holds the last reference to the group can deadlock
    dist.destroy_process_group()


@pytest.mark.filterwarnings(f"ignore:{KEEPS}")
@pytest.mark.usefixtures("process_group")
def test_head_inside_of_data_parallel() -> None:
    model = Normed()
    heads = dict(model.heads.items())
    model.heads = nn.ModuleDict({name: DistributedDataParallel(head) for name, head in heads.items()})
    optimizer = trained(model)
    before = predict(model.eval(), X)
    optimizer.fold()
    torch.testing.assert_close(predict(model, X), before)
    model.heads = nn.ModuleDict(heads)
    torch.testing.assert_close(predict(model, X), before)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("forward_before", [False, True])  # it leaves unsharded parameters
@pytest.mark.parametrize("sharded", ["model", "heads"])
def test_sharded_heads_keep_their_rotations(sharded: str, forward_before: bool) -> None:
    model = TwoTasks()
    for module in [model] if sharded == "model" else model.heads.values():
        fully_shard(module)
    optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads, init="haar")
    with torch.no_grad():
        before = model(X)
    losses = [output.square().mean() for output in model(X)]
    if not forward_before:
        optimizer.backward(losses)
    is_whole = [type(param) is nn.Parameter for param in model.heads.parameters()]
    assert is_whole == [forward_before] * 2
    with pytest.warns(UserWarning, match=f"{KEEPS}.*left: its parameters are sharded.*; right: its parameters are"):
        optimizer.fold()
    with torch.no_grad():
        assert_same(model(X), before)


@pytest.mark.usefixtures("process_group")
def test_heads_behind_a_sharded_backbone_are_folded() -> None:
    model = TwoTasks()
    fully_shard(model.backbone)
    optimizer = trained(model)
    before = predict(model.eval(), X)
    optimizer.fold()
    assert not hooks(cast(nn.Module, model.heads))
    torch.testing.assert_close(predict(model, X), before)
