"""Weights that were kept as a list or vector: reported before the first prediction with other rotations, and once."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from rotoopt import RotoGradOptimizer
from rotoopt._capture.latest import LOOK_EVERY, LatestWeights
from tests.contract.models import sgd, train, wrap
from tests.deploy.kept_weights import EVALUATIONS, TURNING, WAYS, WRITTEN, X, by_data, evaluate, kept_of, warned
from tests.operations import Count


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
