"""A compiled model trains and evaluates like an uncompiled one, and is compiled once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion

from rotoopt import RotoGradOptimizer
from rotoopt._engine.construction import Heads
from tests.contract.models import TwoTasks, assert_moved, assert_same, back_propagate, parameters, sgd, snapshot

# torch.compile reads `.grad` of its inputs, and hides the warning only if warnings are not errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # inductor's own import
]

OLD = TorchVersion(torch.__version__) < "2.12"

Forward = Callable[[Tensor], Sequence[Tensor]]
Way = Callable[[TwoTasks, Any], tuple[Forward, Heads]]


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    """Modules of torch share their code, and its limit of 8 compiled versions; these tests need more."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


def compiled_module(module: nn.Module, **options: Any) -> nn.Module:
    result = torch.compile(module, **options)
    assert isinstance(result, nn.Module)
    return result


def of_parts(backbone: nn.Module, heads: Sequence[nn.Module]) -> Forward:
    def forward(x: Tensor) -> list[Tensor]:
        rep = backbone(x)
        return [head(rep) for head in heads]

    return forward


def eager(model: TwoTasks, backend: Any) -> tuple[Forward, Heads]:
    return model, model.heads


def whole_model(model: TwoTasks, backend: Any) -> tuple[Forward, Heads]:
    return torch.compile(model, backend=backend), model.heads


def in_place(model: TwoTasks, backend: Any) -> tuple[Forward, Heads]:
    model.compile(backend=backend)
    return model, model.heads


def parts_in_place(model: TwoTasks, backend: Any) -> tuple[Forward, Heads]:
    heads = list(model.heads.values())
    for head in heads:
        head.compile(backend=backend)
    return of_parts(compiled_module(model.backbone, backend=backend, fullgraph=True), heads), heads


def parts(model: TwoTasks, backend: Any) -> tuple[Forward, Heads]:
    """The compiled heads are passed to the optimizer, so that its hooks are outside of them."""
    heads = [compiled_module(head, backend=backend, fullgraph=True) for head in model.heads.values()]
    return of_parts(compiled_module(model.backbone, backend=backend, fullgraph=True), heads), heads


def hooks_inside(model: TwoTasks, backend: Any) -> tuple[Forward, Heads]:
    heads = [compiled_module(head, backend=backend) for head in model.heads.values()]
    return of_parts(compiled_module(model.backbone, backend=backend, fullgraph=True), heads), model.heads


WAYS: dict[str, Way] = {
    "whole model": whole_model,
    "in place": in_place,
    "parts in place": parts_in_place,
    "parts": parts,
    "hooks inside": hooks_inside,
}
MAIN_WAYS = ["whole model", "parts in place", "parts"]  # the others are similar, and compiling takes time
BLIND = ["whole model", "in place", "hooks inside"]  # to hooks that are registered after the first call


@dataclass
class Training:
    model: TwoTasks
    forward: Forward
    heads: Heads
    optimizer: RotoGradOptimizer

    def losses(self, x: Tensor) -> list[Tensor]:
        return [output.square().mean() for output in self.forward(x)]

    def step(self, *batches: int) -> None:
        for batch in batches:
            self.step_on(self.model.inputs(batch))

    def step_on(self, x: Tensor) -> None:
        losses = self.losses(x)
        self.optimizer.zero_grad()
        self.optimizer.step(losses)

    def snapshot(self) -> dict[str, Any]:
        return snapshot(self.model, self.optimizer)


def training(way: Way, backend: Any = "eager", **options: Any) -> Training:
    torch.manual_seed(0)
    model = TwoTasks()
    forward, heads = way(model, backend)
    return Training(model, forward, heads, RotoGradOptimizer(sgd(model.parameters()), heads, **options))


def compiled_and_eager(way: str, backend: Any = "eager", **options: Any) -> Iterator[Training]:
    """Yield two trainings to compare. Run the first one before the second: they draw the same random numbers."""
    yield training(WAYS[way], backend, **options)
    yield training(eager, **options)


@pytest.mark.parametrize(
    ("backend", "options"),
    [("eager", {"turn_every": 1}), ("aot_eager", {"init": "haar", "rotation_size": 4})],
    ids=["rotations made lazily", "rotations from the start"],
)
@pytest.mark.parametrize("way", WAYS)
def test_training_is_exact(way: str, backend: str, options: dict[str, Any]) -> None:
    start = training(eager, **{"rotation_size": 6, **options}).snapshot()
    runs = []
    for each in compiled_and_eager(way, backend, **options):
        each.step(0, 1, 2)
        assert_moved(each.model, each.optimizer, start)
        runs.append(each.snapshot())
    assert_same(*runs)


@pytest.mark.parametrize("way", ["whole model", "parts in place"])
def test_autocast_is_exact(way: str) -> None:
    runs = []
    for each in compiled_and_eager(way):
        with torch.autocast("cpu", torch.bfloat16):
            each.step(0, 1, 2)
        runs.append(each.snapshot())
    assert_same(*runs)


@pytest.mark.skipif(OLD, reason="this torch runs a head uncompiled when it cannot compile its hook")
@pytest.mark.parametrize("way", WAYS)
def test_only_the_network_is_compiled_and_once(way: str) -> None:
    """One graph for the backbone and one per head, with linear, tanh, linear, linear: nothing of rotoopt."""
    counter = CompileCounterWithBackend("eager")
    compiled = training(WAYS[way], counter)
    compiled.step(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled.step(1, 2, 3)
    assert (counter.frame_count, counter.op_count) == (3, 4)


def test_many_tasks_share_compiled_code() -> None:
    heads = nn.ModuleList([nn.Linear(6, 2) for _ in range(12)])
    backbone = compiled_module(nn.Sequential(nn.Linear(3, 6), nn.Tanh()), backend="eager")
    for head in heads:
        head.compile(backend="eager")
    optimizer = RotoGradOptimizer(torch.optim.SGD([*backbone.parameters(), *heads.parameters()], lr=0.1), heads)
    with torch._dynamo.config.patch(recompile_limit=8):
        for batch in range(2):
            rep = backbone(TwoTasks().inputs(batch))
            optimizer.step([head(rep).square().mean() for head in heads])


Mode = Callable[[Training], AbstractContextManager[object]]
MODES: dict[str, Mode] = {
    "eval()": lambda training: nullcontext(training.model.eval()),
    "eval(), no_grad()": lambda training: torch.no_grad() if training.model.eval() else nullcontext(),
    "no_grad()": lambda training: torch.no_grad(),
    "inference_mode()": lambda training: torch.inference_mode(),
    "paused()": lambda training: training.optimizer.paused(),
}


def evaluated(training: Training, mode: str) -> list[Tensor]:
    """Return outputs in ``mode`` and, where there is a graph, the gradients of their squares."""
    with MODES[mode](training):
        outputs = list(training.forward(training.model.inputs(7)))
    training.model.train()
    results = [output.detach().clone() for output in outputs]
    if outputs[0].requires_grad:
        objective = torch.stack([output.square().mean() for output in outputs]).sum()
        results += torch.autograd.grad(objective, list(training.model.parameters()))
    return results


@pytest.mark.parametrize("way", MAIN_WAYS)
def test_evaluation_is_exact(way: str) -> None:
    """Between training steps, so that code compiled in one mode is called in the other."""
    runs = []
    for each in compiled_and_eager(way, init="haar"):
        results: list[Any] = []
        for batch, mode in enumerate([*MODES, *MODES]):
            each.step(batch)
            before, record = each.snapshot(), each.optimizer.last_step
            results.append(evaluated(each, mode))
            assert_same(each.snapshot(), before)
            assert each.optimizer.last_step is record
        runs.append([results, each.snapshot()])
    assert_same(*runs)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_before_training_is_exact(mode: str) -> None:
    """It creates the rotations between the compiled graphs, without adding graphs."""
    counter = CompileCounterWithBackend("eager")
    runs, graphs = [], []
    for each in compiled_and_eager("whole model", counter, init="haar"):
        results = evaluated(each, mode)
        graphs.append(counter.frame_count)
        each.step(0, 1)
        runs.append([results, each.snapshot()])
    assert_same(*runs)
    assert graphs[0] <= 6  # backbone, heads, and the rotations next to the break


def test_evaluation_is_one_graph() -> None:
    plain = training(eager, init="haar")
    plain.step(0)
    for context in (torch.no_grad(), nullcontext(plain.model.eval())):
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(plain.model, backend=counter, fullgraph=True)
        with context:
            x = plain.model.inputs(7)
            assert_same(compiled(x), plain.model(x))
        assert counter.frame_count == 1


@pytest.mark.parametrize("way", ["whole model", "parts"])
def test_batches_of_any_size(way: str) -> None:
    """The second size leads to dynamic shapes, as without rotoopt."""
    compiled, expected = training(WAYS[way]), training(eager)
    generator = torch.Generator().manual_seed(0)
    for size in (5, 7, 1, 6, 11):
        x = torch.randn(size, 3, generator=generator)
        with torch.compiler.set_stance("default" if size in (5, 7, 1) else "fail_on_recompile"):
            for each in (compiled, expected):
                each.step_on(x)
                with torch.no_grad():
                    each.forward(x)
    assert_same(compiled.snapshot(), expected.snapshot())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_functional_heads(backend: str) -> None:
    results = []
    for compile_it in (True, False):
        torch.manual_seed(0)
        model = TwoTasks()
        optimizer = RotoGradOptimizer(sgd(model.parameters()), num_tasks=2)

        def losses_of(
            x: Tensor, model: TwoTasks = model, optimizer: RotoGradOptimizer = optimizer
        ) -> tuple[Tensor, Tensor]:
            left, right = optimizer.rotate(model.backbone(x))
            return model.heads["left"](left).square().mean(), model.heads["right"](right).square().mean()

        counter = CompileCounterWithBackend(backend)
        losses = torch.compile(losses_of, backend=counter) if compile_it else losses_of
        for batch in range(4):
            with torch.compiler.set_stance("fail_on_recompile" if batch > 1 else "default"):
                optimizer.zero_grad()
                optimizer.step(losses(model.inputs(batch)))
        assert counter.frame_count == 2 * compile_it  # in front of and behind the rotations
        results.append(snapshot(model, optimizer))
    assert_same(*results)


def built_too_late(way: str) -> Training:
    torch.manual_seed(0)
    model = TwoTasks()
    forward, heads = WAYS[way](model, "eager")
    forward(model.inputs(0))
    return Training(model, forward, heads, RotoGradOptimizer(sgd(model.parameters()), heads))


@pytest.mark.parametrize("way", BLIND)
def test_built_too_late_is_an_error_with_a_fix(way: str) -> None:
    late, expected = built_too_late(way), training(eager)
    with pytest.raises(RuntimeError, match=r"the model was compiled and run before.*or call torch._dynamo.reset\(\)"):
        late.step(0)
    torch._dynamo.reset()
    for each in (late, expected):
        each.step(0, 1)
    assert_same(late.snapshot(), expected.snapshot())


@pytest.mark.parametrize("way", BLIND)
def test_built_too_late_is_reported_by_step(way: str) -> None:
    late = built_too_late(way)
    back_propagate(late.losses(late.model.inputs(0)))
    late.optimizer.step()
    back_propagate(late.losses(late.model.inputs(1)))
    with pytest.warns(UserWarning, match=r"no head that ran.*\(d\) it was compiled and run before the optimizer"):
        late.optimizer.step()


@pytest.mark.parametrize("way", [way for way in WAYS if way not in BLIND])
def test_not_too_late(way: str) -> None:
    late, expected = built_too_late(way), training(eager)
    for each in (late, expected):
        each.step(0, 1)
    assert_same(late.snapshot(), expected.snapshot())


@pytest.mark.parametrize("way", MAIN_WAYS)
def test_remove_gives_the_plain_model_back(way: str) -> None:
    """torch.compile detects that a hook was removed, but not that one was added."""
    runs = []
    for each in compiled_and_eager(way, init="haar"):
        each.step(0, 1)
        evaluated(each, "eval(), no_grad()")
        each.optimizer.remove()
        record = each.optimizer.last_step
        results: list[Any] = [evaluated(each, mode) for mode in ("eval(), no_grad()", "eval()")]
        each.optimizer.zero_grad()
        back_propagate(each.losses(each.model.inputs(2)))
        each.optimizer.optimizer.step()
        assert each.optimizer.last_step is record
        runs.append([results, parameters(each.model)])
    assert_same(*runs)


@pytest.mark.parametrize("way", MAIN_WAYS)
def test_fold_after_compiling(way: str) -> None:
    each = training(WAYS[way], init="haar")
    each.step(0, 1)
    before = evaluated(each, "eval(), no_grad()")
    each.optimizer.fold()
    torch.testing.assert_close(evaluated(each, "eval(), no_grad()"), before)


@pytest.mark.parametrize("way", ["whole model", "parts in place"])
def test_another_optimizer_after_remove(way: str) -> None:
    runs = []
    for each in compiled_and_eager(way):
        each.step(0, 1)
        each.optimizer.remove()
        another = RotoGradOptimizer(each.optimizer.optimizer, each.heads, init="haar")
        again = replace(each, optimizer=another)
        again.step(2, 3)
        runs.append([again.snapshot(), evaluated(again, "eval(), no_grad()")])
    assert_same(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_inductor(way: str) -> None:
    """Sums are computed in another order: some eps of float32, 1.2e-7, per step."""
    runs = []
    for each in compiled_and_eager(way, "inductor", init="haar"):
        each.step(0, 1, 2, 3)
        state = each.snapshot()
        results = evaluated(each, "eval(), no_grad()")
        runs.append([state["parameters"], state["optimizer"]["rotograd"], results])
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.slow
def test_whole_training_step() -> None:
    """It is split into many graphs, with equal results."""
    runs: list[dict[str, Any]] = []
    for each in compiled_and_eager("in place"):
        step = torch.compile(each.step_on, backend="eager") if not runs else each.step_on
        for batch in range(4):
            step(each.model.inputs(batch))
        runs.append(each.snapshot())
    assert_same(*runs)
