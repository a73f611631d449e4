"""Wrong arguments of the constructor."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from rotoopt import GradNorm, RotoGradOptimizer
from tests.asserts import assert_reads_well
from tests.contract.models import TwoTasks, assert_same, snapshot, train, wrap

Cases = dict[str, tuple[type[Exception], str, Callable[[TwoTasks], object]]]


def optimizer_of(model: TwoTasks, **options: Any) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def with_options(**options: Any) -> Callable[[TwoTasks], object]:
    return lambda model: RotoGradOptimizer(optimizer_of(model), **{"heads": model.heads, **options})


def around(make: Callable[[TwoTasks], Any]) -> Callable[[TwoTasks], object]:
    return lambda model: RotoGradOptimizer(make(model), heads=model.heads)


def with_heads(make: Callable[[TwoTasks], Any]) -> Callable[[TwoTasks], object]:
    return lambda model: RotoGradOptimizer(optimizer_of(model), make(model))


def shared(model: TwoTasks) -> RotoGradOptimizer:
    weighting = GradNorm()
    wrap(weighting=weighting)
    return RotoGradOptimizer(optimizer_of(model), heads=model.heads, weighting=weighting)


BUILT = "`optimizer` must be a torch.optim.Optimizer that is already built, got"
ONE_OF = "Exactly one of `heads` and `num_tasks` must be given, got heads="
MODULES = "`heads` must be a sequence or a mapping of modules, got"
ROTATION_OPTIMIZER = "`rotation_optimizer` must be a callable from parameters to a torch.optim.Optimizer, got"
WEIGHTING = "`weighting` must be a Weighting or a callable (K, n) -> (n,), such as ProgressWeighting(),"
DIM = "`dim` must be an int or a non-empty sequence of ints, got"
SIZE = "`rotation_size` must be a positive int or None, got"
ROTATE = "`rotate` must be a bool or one bool per task, got"
BURN_IN = "`burn_in_period` must be a non-negative number of steps, got"
RATE = "`rotation_lr` must be a non-negative number, got"

CASES: Cases = {
    "optimizer is the parameters": (TypeError, f"{BUILT} a generator. Ex", around(lambda model: model.parameters())),
    "optimizer is a class": (TypeError, f"{BUILT} the class Adam.", around(lambda model: Adam)),
    "optimizer is the model": (TypeError, f"{BUILT} a TwoTasks.", around(lambda model: model)),
    "optimizer is wrapped": (
        TypeError,
        "`optimizer` must be the optimizer to wrap, got a RotoGradOptimizer, as when",
        around(lambda model: RotoGradOptimizer(optimizer_of(model), num_tasks=2)),
    ),
    "optimizer is None": (TypeError, f"{BUILT} a NoneType.", around(lambda model: None)),
    "optimizer without parameters": (
        ValueError,
        "`optimizer` must have at least one parameter, got none. Pass it model.parameters().",
        around(lambda model: SGD([{"params": []}], lr=0.1)),
    ),
    "differentiable": (
        ValueError,
        "`optimizer` must have differentiable=False, got True.",
        around(lambda model: optimizer_of(model, differentiable=True)),
    ),
    "neither heads nor tasks": (ValueError, f"{ONE_OF}None and num_tasks=None.", with_options(heads=None)),
    "both heads and tasks": (ValueError, "and num_tasks=2. Give the modules that", with_options(num_tasks=2)),
    "heads are the model": (
        TypeError,
        f"{MODULES} a TwoTasks. List those that consume",
        with_heads(lambda model: model),
    ),
    "heads are a function": (TypeError, f"{MODULES} a function.", with_heads(lambda model: lambda rep: rep)),
    "heads are a Sequential": (
        TypeError,
        f"{MODULES} a Sequential.",
        with_heads(lambda m: nn.Sequential(m.heads["left"])),
    ),
    "heads are names": (
        TypeError,
        "`heads` must be modules, got a str for heads[0]. For functional heads, pass num_tasks=K",
        with_heads(lambda model: ["left", "right"]),
    ),
    "heads are classes": (TypeError, "got the class Linear for heads[0].", with_heads(lambda model: [nn.Linear])),
    "heads are weights": (
        TypeError,
        "`heads` must have a module for every task, got none for heads[0]. A head is",
        with_heads(lambda m: list(m.heads.parameters())),
    ),
    "head in a head": (
        ValueError,
        "`heads` must be separate, got a module of heads[0] that is part of one of heads[1].",
        with_heads(lambda model: [model.heads["left"], nn.Sequential(model.heads["left"], nn.Linear(1, 2))]),
    ),
    "heads are outputs": (TypeError, "got a Tensor for heads[0].", with_heads(lambda model: [torch.zeros(2)])),
    "a head takes no hooks": (
        TypeError,
        "`heads` must be modules that accept hooks, got a RecursiveScriptModule for heads[1]: register_forward_pre",
        with_heads(lambda model: [model.heads["left"], torch.jit.script(model.heads["right"])]),
    ),
    "no heads": (ValueError, "`heads` must have at least one module, got none.", with_options(heads=[])),
    "numbered heads": (
        TypeError,
        "`heads` must be named by strings, got [0, 1].",
        with_heads(lambda model: dict(enumerate(model.heads.values()))),
    ),
    "head twice": (
        ValueError,
        "`heads` must be different modules, got one of them twice in ['heads[0]', 'heads[1]']. Every task needs a head",
        with_heads(lambda model: [model.heads["left"]] * 2),
    ),
    "num_tasks is zero": (
        ValueError,
        "`num_tasks` must be a positive int, got 0.",
        with_options(heads=None, num_tasks=0),
    ),
    "num_tasks is a float": (ValueError, "positive int, got 2.0.", with_options(heads=None, num_tasks=2.0)),
    "num_tasks is a flag": (ValueError, "positive int, got True.", with_options(heads=None, num_tasks=True)),
    "no dim": (ValueError, f"{DIM} ().", with_options(dim=())),
    "dim is a float": (ValueError, f"{DIM} 1.5.", with_options(dim=1.5)),
    "dim is a name": (ValueError, f"{DIM} 'C'.", with_options(dim="C")),
    "rotation_size is zero": (ValueError, f"{SIZE} 0.", with_options(rotation_size=0)),
    "rotation_size is a float": (ValueError, f"{SIZE} 2.5.", with_options(rotation_size=2.5)),
    "rotation_size is text": (ValueError, f"{SIZE} '8'.", with_options(rotation_size="8")),
    "rotation_size is a flag": (ValueError, f"{SIZE} True.", with_options(rotation_size=True)),
    "too few flags": (ValueError, f"{ROTATE} [True] for 2 tasks.", with_options(rotate=[True])),
    "rotate is a number": (ValueError, f"{ROTATE} 1 for 2 tasks.", with_options(rotate=1)),
    "rotate is None": (ValueError, f"{ROTATE} None for 2 tasks.", with_options(rotate=None)),
    "rotate holds numbers": (ValueError, f"{ROTATE} [1, 0] for 2 tasks.", with_options(rotate=[1, 0])),
    "weighting is a class": (TypeError, WEIGHTING, with_options(weighting=GradNorm)),
    "weighting is a name": (TypeError, f"{WEIGHTING} GradNorm(alpha=1.5)", with_options(weighting="gradnorm")),
    "weighting of another optimizer": (
        ValueError,
        "`weighting` must not be shared between optimizers, got a GradNorm that another one uses. Make a new",
        shared,
    ),
    "alpha": (ValueError, "`alpha` must be a non-negative number, got -1.", lambda model: GradNorm(alpha=-1)),
    "alpha is NaN": (ValueError, "non-negative number, got nan.", lambda model: GradNorm(alpha=float("nan"))),
    "burn_in_period is negative": (ValueError, f"{BURN_IN} -1.", with_options(burn_in_period=-1)),
    "burn_in_period is a share": (ValueError, f"{BURN_IN} 0.1.", with_options(burn_in_period=0.1)),
    "burn_in_period is None": (ValueError, f"{BURN_IN} None.", with_options(burn_in_period=None)),
    "rotation_lr is negative": (ValueError, f"{RATE} -0.1.", with_options(rotation_lr=-0.1)),
    "rotation_lr is NaN": (ValueError, f"{RATE} nan.", with_options(rotation_lr=float("nan"))),
    "rotation_lr is text": (ValueError, f"{RATE} '1e-3'.", with_options(rotation_lr="1e-3")),
    "rotation_optimizer is built": (
        TypeError,
        f"{ROTATION_OPTIMIZER} a SGD. Example: rotation_optimizer=lambda params: torch.optim.Adam(params, lr=1e-4).",
        lambda model: with_options(rotation_optimizer=optimizer_of(model))(model),
    ),
    "rotation_optimizer returns parameters": (
        TypeError,
        f"{ROTATION_OPTIMIZER} one that returns list.",
        with_options(rotation_optimizer=lambda params: params),
    ),
    "init": (ValueError, "`init` must be 'identity' or 'haar', got 'random'.", with_options(init="random")),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_wrong_argument(name: str) -> None:
    error, message, call = CASES[name]
    model = TwoTasks()
    before = snapshot(model, optimizer_of(model))
    hooks = [copy.copy(head._forward_pre_hooks) for head in model.heads.values()]
    with pytest.raises(error, match=re.escape(message)) as raised:
        call(model)
    assert_reads_well(str(raised.value))
    assert_same(snapshot(model, optimizer_of(model)), before)
    if name != "wrapped twice":
        assert [head._forward_pre_hooks for head in model.heads.values()] == hooks
        with_options()(model)  # nothing is left that would prevent the next construction


def test_weighting_can_be_reused_after_another_argument_was_wrong() -> None:
    weighting = GradNorm()
    for options in ({"dim": ()}, {"rotation_optimizer": list}, {"init": "random"}, {"burn_in_period": -1}):
        with pytest.raises((TypeError, ValueError)):
            with_options(weighting=weighting, **options)(TwoTasks())
    with_options(weighting=weighting)(TwoTasks())


def test_weights_before_the_optimizer() -> None:
    with pytest.raises(
        RuntimeError, match="GradNorm must belong to an optimizer before its weights are read or trained"
    ):
        _ = GradNorm().weights


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_failed_constructor_keeps_the_rotations_of_the_previous_optimizer() -> None:
    model, optimizer = wrap(init="haar")
    train(model, optimizer, 0)
    before, x = snapshot(model, optimizer), model.inputs(0)
    predictions = [output.detach() for output in model(x)]
    weighting = GradNorm()
    scripted = torch.jit.script(nn.Linear(6, 2))
    with pytest.raises(TypeError, match="accept hooks"):
        RotoGradOptimizer(optimizer_of(model), [*model.heads.values(), scripted], weighting=weighting)
    with pytest.raises(ValueError, match="match their rotations"):
        RotoGradOptimizer(optimizer_of(model), model.heads, rotation_size=4)
    assert_same(snapshot(model, optimizer), before)
    assert_same([output.detach() for output in model(x)], predictions)
    train(model, optimizer, 1)
    RotoGradOptimizer(optimizer_of(model), model.heads, weighting=weighting)


def test_one_module_may_be_listed_for_every_layer_that_calls_it() -> None:
    """As in Deformable DETR, whose lists of heads hold one module several times; but not in another task."""
    model = TwoTasks()
    left, right = (nn.ModuleList([head] * 3) for head in model.heads.values())
    optimizer = RotoGradOptimizer(optimizer_of(model), {"left": left, "right": right})
    plain, same = wrap()
    for of, to in ((model, optimizer), (plain, same)):
        train(of, to, 0, 1)
    assert_same(snapshot(model, optimizer), snapshot(plain, same))
    with pytest.raises(ValueError, match=r"^`heads` must be different modules, .*list the modules that compute the"):
        RotoGradOptimizer(optimizer_of(model), [left, left])
