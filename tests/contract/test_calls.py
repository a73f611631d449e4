"""All ways to call the optimizer are bit-identical."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rotoopt import ProgressWeighting, RotoGradOptimizer, RotoGradWeighting
from rotoopt._engine.construction import Heads
from tests.contract.models import (
    TwoTasks,
    assert_moved,
    assert_same,
    back_propagate,
    gradients,
    parameters,
    snapshot,
    train,
    wrap,
)

Call = Callable[[TwoTasks, RotoGradOptimizer, int], object]


def named(model: TwoTasks, batch: int) -> dict[str, Tensor]:
    left, right = model.losses(batch)[0]
    return {"right": right, "left": left}  # not the order of the heads


def by_keyword(model: TwoTasks, optimizer: RotoGradOptimizer, batch: int) -> None:
    losses, rep = model.losses(batch)
    optimizer.step(losses=losses, rep=rep)


def backward_then_step(model: TwoTasks, optimizer: RotoGradOptimizer, batch: int) -> None:
    optimizer.backward(*model.losses(batch))
    optimizer.step()


def plain_loop(model: TwoTasks, optimizer: RotoGradOptimizer, batch: int) -> None:
    back_propagate(model.losses(batch)[0])
    optimizer.step()


def closure(model: TwoTasks, optimizer: RotoGradOptimizer, batch: int) -> Callable[[], float]:
    def evaluate() -> float:
        optimizer.zero_grad()
        return back_propagate(model.losses(batch)[0])

    return evaluate


CALLS: dict[str, Call] = {
    "step(losses, rep)": lambda model, optimizer, batch: optimizer.step(*model.losses(batch)),
    "step(losses)": lambda model, optimizer, batch: optimizer.step(model.losses(batch)[0]),
    "step(tuple)": lambda model, optimizer, batch: optimizer.step(tuple(model.losses(batch)[0])),
    "step(names)": lambda model, optimizer, batch: optimizer.step(named(model, batch)),
    "step(losses=, rep=)": by_keyword,
    "backward(losses, rep), step()": backward_then_step,
    "sum(losses).backward(), step()": plain_loop,
    "step(closure)": lambda model, optimizer, batch: optimizer.step(closure(model, optimizer, batch)),
    "step(closure=closure)": lambda model, optimizer, batch: optimizer.step(closure=closure(model, optimizer, batch)),
}


def run(call: Call, turn_every: int | None) -> tuple[list[Tensor], Tensor, Tensor]:
    # Without progress: in the user's own backward pass, losses are unknown.
    model, optimizer = wrap(turn_every=turn_every, weighting=ProgressWeighting(alpha=0.0))
    before = snapshot(*wrap(rotation_size=6))
    for batch in range(3):
        optimizer.zero_grad()
        call(model, optimizer, batch)
    assert_moved(model, optimizer, before)
    return parameters(model), optimizer.rotations.matrices, optimizer.task_weights


@pytest.mark.parametrize("turn_every", [None, 1])
@pytest.mark.parametrize("name", CALLS)
def test_call(name: str, turn_every: int | None) -> None:
    assert_same(run(CALLS[name], turn_every), run(CALLS["step(losses, rep)"], turn_every))


def test_step_returns_what_the_closure_returned() -> None:
    model, optimizer = wrap()
    evaluate = closure(model, optimizer, 0)
    expected = evaluate()
    assert optimizer.step(evaluate) == expected
    assert CALLS["step(losses, rep)"](model, optimizer, 1) is None


def test_absent_task_is_none_or_a_missing_name() -> None:
    results = []
    for name_it in (False, True):
        model, optimizer = wrap()
        train(model, optimizer, 0)
        (left, _), rep = model.losses(1)
        optimizer.zero_grad()
        optimizer.step({"left": left} if name_it else [left, None], rep)
        results.append(snapshot(model, optimizer))
    assert_same(*results)


HEADS: dict[str, Callable[[TwoTasks], Heads]] = {
    "list": lambda model: list(model.heads.values()),
    "tuple": lambda model: tuple(model.heads.values()),
    "dict": lambda model: dict(model.heads.items()),
    "ModuleList": lambda model: nn.ModuleList(model.heads.values()),
    "ModuleDict": lambda model: model.heads,
    "lists": lambda model: [[head] for head in model.heads.values()],
    "dicts": lambda model: {name: {"out": head} for name, head in model.heads.items()},
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    expected = wrap(num_tasks=2)
    for batch in range(3):
        expected[1].zero_grad()
        expected[1].step(*expected[0].losses(batch, expected[1].rotate))
    model, unused = wrap()
    unused.remove()
    optimizer = RotoGradOptimizer(unused.optimizer, HEADS[name](model))
    train(model, optimizer, 0, 1, 2)
    assert_same(snapshot(model, optimizer), snapshot(*expected))


class KeywordHead(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, *, features: Tensor, scale: float = 1.0) -> Tensor:
        return scale * torch.as_tensor(self.linear(features))


def test_rep_as_keyword_argument() -> None:
    results = []
    for by_keyword in (False, True):
        torch.manual_seed(0)
        model = TwoTasks()
        heads = [KeywordHead(head) for head in model.heads.values()] if by_keyword else list(model.heads.values())
        optimizer = RotoGradOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), heads)
        for batch in range(3):
            rep = model.backbone(model.inputs(batch))
            outputs = [head(features=rep, scale=1.0) if by_keyword else head(rep) for head in heads]
            optimizer.zero_grad()
            optimizer.step([output.square().mean() for output in outputs], rep)
        results.append(snapshot(model, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("args", [(), (None,)], ids=["step()", "step(None)"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_step_without_a_backward_pass_changes_no_rotation(args: tuple[None, ...], set_to_none: bool) -> None:
    model, optimizer = wrap(lambda params: torch.optim.SGD(params, lr=0.1))
    train(model, optimizer, 0)
    optimizer.zero_grad(set_to_none)
    before = snapshot(model, optimizer)
    for _ in range(3):
        assert optimizer.step(*args) is None
        optimizer.step(closure=None)
    assert_same(snapshot(model, optimizer), before)


def test_first_step_without_a_backward_pass_changes_no_rotation() -> None:
    model, optimizer = wrap()
    before = snapshot(model, optimizer)
    optimizer.step(closure=None)  # as torch.distributed.checkpoint does, to initialize the state of the optimizer
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("call", ["step", "backward"])
def test_backbone_loss_adds_its_own_gradient(call: str) -> None:
    plain, optimizer = wrap()
    optimizer.backward(*plain.losses(0))
    optimizer.step()
    model, regularized = wrap()
    weight = next(model.backbone.parameters())
    gradient = 2 * weight.detach()
    getattr(regularized, call)(*model.losses(0), backbone_loss=weight.square().sum())
    expected = gradients(plain)
    assert expected[0] is not None
    assert_same(gradients(model), [expected[0] + gradient, *expected[1:]])
    if call == "backward":
        regularized.step()
    assert_same(regularized.state_dict()["rotograd"], optimizer.state_dict()["rotograd"])


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("own_backward", [False, True])
def test_representation_may_be_a_parameter(own_backward: bool, passes: int) -> None:
    """Unlike the output of a backbone, it is the same tensor in every forward pass."""
    trained = []
    for represent in (lambda z: z, torch.clone):
        torch.manual_seed(0)
        z, heads = nn.Parameter(torch.randn(5, 4)), nn.ModuleList(nn.Linear(4, 2) for _ in range(2))
        bare = torch.optim.SGD([z, *heads.parameters()], lr=0.1)
        optimizer = RotoGradOptimizer(bare, heads=heads, weighting=RotoGradWeighting())
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(passes):
                rep = represent(z)
                losses = [(head(rep) - 1).square().mean() for head in heads]
                if own_backward:
                    back_propagate(losses)
                else:
                    optimizer.backward(losses, rep)
            optimizer.step()
        rep = represent(z)
        losses = [head(rep).sum() for head in heads]
        back_propagate(losses[:1])
        with pytest.raises(RuntimeError, match="must be back-propagated together and once"):
            back_propagate(losses[1:])
        trained.append([z.detach(), optimizer.rotations.matrices, optimizer.task_weights])
    assert_same(*trained)


@pytest.mark.parametrize(
    ("heads", "names"),
    [("list", ("heads[0]", "heads[1]")), ("ModuleDict", ("left", "right")), (None, ("task 0", "task 1"))],
)
def test_task_names_are_the_keys_of_losses(heads: str | None, names: tuple[str, ...]) -> None:
    model, unused = wrap()
    unused.remove()
    fed = {"heads": HEADS[heads](model)} if heads is not None else {"num_tasks": 2}
    optimizer = RotoGradOptimizer(unused.optimizer, **fed)
    assert optimizer.task_names == names
    losses, _ = model.losses(0, optimizer.rotate if heads is None else None)
    optimizer.step(dict(zip(reversed(names), reversed(losses), strict=True)))
    record = optimizer.last_step
    assert record is not None
    assert record.losses is not None
    assert record.losses.tolist() == [loss.item() for loss in losses]
