"""Weights that were kept as a list or vector: reported before the first prediction with other rotations, and once."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import vector_to_parameters
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from rotoopt import RotoGradOptimizer
from rotoopt._capture.latest import LOOK_EVERY, LatestWeights
from tests.contract.models import TwoTasks, back_propagate, sgd, train, wrap
from tests.operations import Count

WRITTEN = "Weights of a head should be replaced together with its rotation, got other weights of "
TURNING: dict[str, Any] = {"rotation_optimizer": partial(SGD, lr=1.0)}  # in every step
X = TwoTasks().inputs(99)
Params = Sequence[nn.Parameter]


@torch.no_grad()
def by_copy(params: Params, kept: Sequence[Tensor]) -> None:
    for param, value in zip(params, kept, strict=True):
        param.copy_(value)


def by_data(params: Params, kept: Sequence[Tensor]) -> None:
    for param, value in zip(params, kept, strict=True):
        param.data.copy_(value)


def by_new_data(params: Params, kept: Sequence[Tensor]) -> None:
    for param, value in zip(params, kept, strict=True):
        param.data = value.clone()


def by_vector(params: Params, kept: Sequence[Tensor]) -> None:
    vector_to_parameters(torch.cat([each.flatten() for each in kept]), params)


def by_foreach(params: Params, kept: Sequence[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(params), list(kept))


def by_average(params: Params, kept: Sequence[Tensor]) -> None:
    for param, value in zip(params, kept, strict=True):
        param.data.lerp_(value, 0.5)


WAYS = [by_copy, by_data, by_new_data, by_vector, by_foreach, by_average]


def kept_of(params: Params) -> list[Tensor]:
    return [param.detach().clone() for param in params]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield
    model.train()


EVALUATIONS: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "no_grad": lambda _: torch.no_grad(),
    "inference_mode": lambda _: torch.inference_mode(),
    "eval": in_eval_mode,
}


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in record]


def evaluate(model: nn.Module, kind: str = "no_grad") -> list[Tensor]:
    with EVALUATIONS[kind](model):
        return [each.detach().clone() for each in model(X)]


@given(
    way=st.sampled_from(WAYS),
    kind=st.sampled_from(sorted(EVALUATIONS)),
    before=st.integers(0, 20),
    after=st.integers(2, 20),
    validates=st.lists(st.booleans(), min_size=40, max_size=40),
    of=st.sampled_from(["model", "heads", "left", "right"]),
    turns=st.sampled_from(["often", "as by default"]),
)
def test_weights_that_were_kept_without_rotations_are_reported_before_the_first_wrong_prediction(
    way: Callable[..., None], kind: str, before: int, after: int, validates: list[bool], of: str, turns: str
) -> None:
    model, optimizer = wrap(**(TURNING if turns == "often" else {}))
    module = {"model": model, "heads": model.heads, "left": model.heads["left"], "right": model.heads["right"]}[of]
    params = list(module.parameters())
    kept, angles = kept_of(params), torch.zeros(2)
    for step in range(before + after):
        if step == before:
            kept = kept_of(params)
            angles = torch.zeros(2) if optimizer.last_step is None else optimizer.last_step.total_angles
        train(model, optimizer, step)
        if validates[step]:
            assert not warned(lambda: evaluate(model, kind))
    assert optimizer.last_step is not None
    have_turned = bool((optimizer.last_step.total_angles != angles).any())
    way(params, kept)
    found = warned(lambda: evaluate(model, kind))
    expected = ["left", "right"] if of in ("model", "heads") else [of]
    assert len(found) == 1 or not have_turned
    assert all(re.match(WRITTEN, each) for each in found)
    assert not found or all(name in found[0] for name in expected)
    assert not warned(lambda: evaluate(model, kind))


def test_the_predictions_of_reported_weights_are_wrong() -> None:
    model, optimizer = wrap(**TURNING)
    train(model, optimizer, *range(5))
    kept, expected = kept_of(list(model.parameters())), evaluate(model)
    train(model, optimizer, *range(5, 25))
    evaluate(model)
    by_data(list(model.parameters()), kept)
    with pytest.warns(UserWarning, match=WRITTEN):
        found = evaluate(model)
    assert not torch.allclose(found[0], expected[0], rtol=1e-2)


@pytest.mark.parametrize("of", ["model", "left"])
def test_weights_of_earlier_steps_that_are_given_to_functional_call_are_reported(of: str) -> None:
    model, optimizer = wrap(**TURNING)
    train(model, optimizer, *range(3))
    names = [name for name, _ in model.named_parameters() if of in ("model", name.split(".")[1])]
    present: dict[str, Tensor] = dict(model.named_parameters())
    kept = {name: present[name].detach().clone() for name in names}
    train(model, optimizer, *range(3, 6))
    with torch.no_grad():
        assert not warned(lambda: functional_call(model, present, X))
        (message,) = warned(lambda: functional_call(model, kept, X))
    assert message.startswith(WRITTEN)


def test_weights_that_were_cast_are_compared_with_those_of_the_first_evaluation_afterwards() -> None:
    model, optimizer = wrap(**TURNING)
    kept = kept_of(list(model.parameters()))
    train(model, optimizer, *range(2 * LOOK_EVERY))
    model.double()
    with torch.no_grad():
        assert not warned(lambda: model(X.double()))
        by_data(list(model.parameters()), kept)
        assert len(warned(lambda: model(X.double()))) == 1


def test_averages_that_are_swapped_in_for_each_validation_are_reported_once() -> None:
    model, optimizer = wrap(**TURNING)
    params = list(model.parameters())
    averages = kept_of(params)

    def run() -> None:
        for step in range(20):
            train(model, optimizer, step)
            torch._foreach_lerp_(averages, kept_of(params), 0.1)
            if step % 5 == 4:
                stored = kept_of(params)
                by_data(params, averages)
                evaluate(model)
                by_data(params, stored)
                evaluate(model)

    (message,) = warned(run)
    assert message.startswith(WRITTEN + "left, right than after the latest step.")


Loop = Callable[[TwoTasks, RotoGradOptimizer, int], object]
seen: dict[str, Any] = {}


def load_the_best(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    if step == 3:
        seen["best"] = copy.deepcopy(model.state_dict())
    elif step % 7 == 6:
        model.load_state_dict(seen["best"])


def resume(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    if step == 3:
        seen["state"] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    elif step % 7 == 6:
        model.load_state_dict(seen["state"][0])
        optimizer.load_state_dict(seen["state"][1])


def average(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    averaged = seen.setdefault("averaged", AveragedModel(model))
    train(model, optimizer, step)
    averaged.update_parameters(model)
    optimizer.refresh(averaged)
    evaluate(averaged.module)


def accumulate(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    optimizer.backward(model.losses(step)[0])
    if step % 3 == 2:
        optimizer.step()
        optimizer.zero_grad()


def constrain(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    for param in model.heads.parameters():
        param.data.mul_(0.99)


def train_the_heads_twice(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    other = seen.setdefault("other", SGD(model.heads.parameters(), lr=0.01))
    train(model, optimizer, step)
    optimizer.zero_grad()
    with optimizer.paused():
        back_propagate(model.losses(step)[0])
    other.step()


def train_paused(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    if step % 2:
        train(model, optimizer, step)
    else:
        optimizer.zero_grad()
        with optimizer.paused():
            back_propagate(model.losses(step)[0])
        optimizer.step()


def swap_without_evaluation(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    params = list(model.parameters())
    stored = kept_of(params)
    by_data(params, [torch.zeros_like(each) for each in stored])
    by_vector(params, stored)


def restore_the_start(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    kept = seen.setdefault("start", kept_of(list(model.parameters())))
    train(model, optimizer, step)
    if step % 7 == 6:
        by_data(list(model.parameters()), kept)


def diverge(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    if step == 5:
        by_data(list(model.parameters()), [each * torch.nan for each in model.parameters()])
        train(model, optimizer, step)


def cast(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    train(model, optimizer, step)
    if step == 5:
        with torch.no_grad():
            model.bfloat16()(X.bfloat16())
        model.float()


def schedule(model: TwoTasks, optimizer: RotoGradOptimizer, step: int) -> None:
    scheduler = seen.setdefault("scheduler", torch.optim.lr_scheduler.StepLR(optimizer, 3))
    train(model, optimizer, step)
    scheduler.step()


LEGITIMATE: dict[str, tuple[Loop, dict[str, Any]]] = {
    "validation": (train, TURNING),
    "load_state_dict": (load_the_best, TURNING),
    "resume": (resume, TURNING),
    "AveragedModel": (average, TURNING),
    "accumulation": (accumulate, TURNING),
    "constraint": (constrain, TURNING),
    "another optimizer": (train_the_heads_twice, TURNING),
    "paused": (train_paused, TURNING),
    "swap without evaluation": (swap_without_evaluation, TURNING),
    "NaN": (diverge, TURNING),
    "cast": (cast, TURNING),
    "scheduler": (schedule, TURNING),
    "rotate=False": (restore_the_start, {"rotate": False}),
    "no updates": (restore_the_start, {"rotation_lr": 0.0}),
    "one task is not rotated": (train, {**TURNING, "rotate": [True, False]}),
}


@pytest.mark.parametrize("kind", EVALUATIONS)
@pytest.mark.parametrize("name", LEGITIMATE)
def test_other_loops_are_not_reported(name: str, kind: str) -> None:
    loop, options = LEGITIMATE[name]
    seen.clear()
    model, optimizer = wrap(**options)
    for step in range(20):
        loop(model, optimizer, step)
        evaluate(model, kind)
        evaluate(model, kind)


@pytest.mark.parametrize(
    "end", ["remove", "fold", "another optimizer", "another optimizer for one head", "a copy of both"]
)
def test_weights_are_not_compared_after_the_training(end: str) -> None:
    model, optimizer = wrap(**TURNING)
    kept = kept_of(list(model.parameters()))
    train(model, optimizer, *range(5))
    if end in ("remove", "fold"):
        getattr(optimizer, end)()
    elif end == "another optimizer":
        RotoGradOptimizer(sgd(model.parameters()), model.heads)
    elif end == "another optimizer for one head":
        RotoGradOptimizer(sgd(model.parameters()), {"left": model.heads["left"]})
    else:
        model, optimizer = copy.deepcopy((model, optimizer))
    by_data(list(model.parameters()), kept)
    evaluate(model)


def test_a_copy_that_is_trained_on_is_compared_again() -> None:
    model, optimizer = wrap(**TURNING)
    train(model, optimizer, 0, 1, 2)
    model, optimizer = copy.deepcopy((model, optimizer))
    kept = kept_of(list(model.parameters()))
    train(model, optimizer, 3, 4, 5)
    evaluate(model)
    by_data(list(model.parameters()), kept)
    with pytest.warns(UserWarning, match=WRITTEN):
        evaluate(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_models_that_are_compiled_for_training_are_compared_in_plain_evaluations() -> None:
    """A compiled evaluation remains one graph, which cannot report anything."""
    model, optimizer = wrap(**TURNING)
    compiled = torch.compile(model, backend="eager")
    kept = kept_of(list(model.parameters()))
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.step([output.square().mean() for output in compiled(model.inputs(batch))])
    by_data(list(model.parameters()), kept)
    with torch.no_grad():
        compiled(X)
    with pytest.warns(UserWarning, match=WRITTEN):
        evaluate(model)


@pytest.mark.parametrize("evaluated", ["the latest step", "every step"])
def test_devices_are_waited_for_once_per_forward_pass_and_rarely_in_training(
    evaluated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatestWeights, "_waits", lambda _: True)
    model, optimizer = wrap(**TURNING)
    params = list(model.parameters())
    kept, compared = kept_of(params), []
    for step in range(5 * LOOK_EVERY):
        train(model, optimizer, step)
        if evaluated == "every step":
            with Count() as count:
                evaluate(model)
            compared.append(count.found["equal"])
    if evaluated == "every step":
        assert compared[:LOOK_EVERY] == [0] + [1] * (LOOK_EVERY - 1)
        assert sum(compared[2 * LOOK_EVERY :]) == 3
    else:
        for _ in range(3):
            with Count() as count:
                evaluate(model)
            assert count.found["equal"] == 1
    by_data(params, kept)
    assert len(warned(lambda: evaluate(model))) == 1


def test_weights_on_the_cpu_are_compared_in_every_evaluation() -> None:
    """Also if there is one in every step: nothing waits for it."""
    model, optimizer = wrap(**TURNING)
    params = list(model.parameters())
    kept = kept_of(params)
    for step in range(2 * LOOK_EVERY + 3):
        train(model, optimizer, step)
        evaluate(model)
    by_data(params, kept)
    assert len(warned(lambda: evaluate(model))) == 1


def test_only_rotated_heads_are_named() -> None:
    model, optimizer = wrap(**{**TURNING, "rotate": [False, True]})
    train(model, optimizer, *range(3))
    kept = kept_of(list(model.parameters()))
    train(model, optimizer, *range(3))
    by_data(list(model.heads["left"].parameters()), [torch.zeros(1, 6)])
    evaluate(model)
    by_data(list(model.parameters()), kept)
    with pytest.warns(UserWarning, match=f"{WRITTEN}right than"):
        evaluate(model)
