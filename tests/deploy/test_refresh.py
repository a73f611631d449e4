"""Copies of the model alone keep the rotations of the time of copying, until refresh()."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt._capture.representation import RotatedDims
from tests.asserts import eps
from tests.contract.models import TwoTasks, assert_moved, assert_same, back_propagate, snapshot, train, wrap
from tests.oracle import layout, rotate
from tests.samplers import DTYPES, LAYOUTS, SEEDS, Layout, Network, batches, network

# Haar rotations, updated in every step: the built-in step does nothing until gradients agree.
OPTIONS: dict[str, Any] = {"init": "haar", "rotation_optimizer": partial(SGD, lr=1.0)}
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "EMA": lambda model: AveragedModel(model, avg_fn=lambda old, new, _: (old + new) / 2),
}


def inner(model_copy: Any) -> Any:
    return model_copy.module if isinstance(model_copy, AveragedModel) else model_copy


@torch.no_grad()
def by_hand(model: Network, matrices: Tensor, dim: int | tuple[int, ...], x: Tensor) -> list[Tensor]:
    """Return head_k(R_k z), without hooks."""
    z = model.backbone(x)
    index = layout(z.shape, dim if isinstance(dim, tuple) else (dim,))
    heads = [nn.Sequential(*layers) for layers in map(nn.Module.children, model.heads)]
    return [head(rotate(z, R, index)) for head, R in zip(heads, matrices, strict=True)]


@pytest.mark.parametrize("name", COPIES)
@given(
    case=st.sampled_from(LAYOUTS),
    K=st.integers(2, 4),
    rest=st.integers(1, 3) | st.none(),
    made_after=st.integers(0, 2),
    seed=SEEDS,
    dtype=DTYPES,
)
def test_refreshed_copy_rotates_as_the_model_does_now(
    name: str, case: Layout, K: int, rest: int | None, made_after: int, seed: int, dtype: torch.dtype
) -> None:
    """With its own weights, at any time of copying."""
    shape, dim = case
    *data, (x, _) = batches(seed, 4, K, dtype)
    model = network(seed, shape[1:], K, dtype)
    size = None if rest is None else RotatedDims(dim).size(torch.Size(shape)) - rest
    bare, heads = SGD(model.parameters(), lr=0.1), list(model.heads)
    optimizer = RotoGradOptimizer(bare, heads, dim=dim, rotation_size=size, **OPTIONS)
    model_copy: Any = None
    for i, batch in enumerate(data):
        if i == made_after:
            model_copy = COPIES[name](model)
        optimizer.zero_grad()
        optimizer.step(*model.losses(batch))
        if isinstance(model_copy, AveragedModel):
            model_copy.update_parameters(model)
    generator, weights = torch.get_rng_state(), copy.deepcopy(model_copy.state_dict())
    optimizer.refresh(model_copy)
    assert_same(torch.get_rng_state(), generator)
    assert_same(model_copy.state_dict(), weights)
    copied = inner(model_copy)
    with torch.no_grad():
        outputs = [head(copied.backbone(x)) for head in copied.heads]
    expected = by_hand(copied, optimizer.rotations.matrices, dim, x)
    assert_close(outputs, expected, rtol=0, atol=100 * eps(dtype))  # outputs of size one, sums of at most 36 products


@pytest.mark.parametrize("order", ["weights first", "rotations first"])
@pytest.mark.parametrize("made_after", [0, 1])
def test_refreshed_copy_is_the_model_to_the_bit(made_after: int, order: str) -> None:
    """A target network: current weights and rotations, until it is refreshed again."""
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, *range(made_after))
    target, x = copy.deepcopy(model), model.inputs(5)
    for inference in (True, False, True):
        train(model, optimizer, 1, 2)
        if order == "weights first":
            target.load_state_dict(model.state_dict())
        with torch.inference_mode(inference):
            optimizer.refresh(target)
        if order == "rotations first":
            target.load_state_dict(model.state_dict())
        outputs = predict(target, x)
        assert_same(outputs, predict(model, x))
        back_propagate(target.losses(0)[0])  # it can be trained
        train(model, optimizer, 3)
        assert_same(predict(target, x), outputs)
        model.load_state_dict(target.state_dict())
        assert_same(predict(model, x), outputs)


@torch.no_grad()
def predict(model: TwoTasks, x: Tensor) -> list[Tensor]:
    return list(model(x))


@pytest.mark.parametrize("made_after", [0, 2])
def test_training_a_copy_does_not_touch_the_model(made_after: int) -> None:
    (model, optimizer), (expected_model, expected) = (wrap(rotation_size=4, **OPTIONS) for _ in range(2))
    for each_model, each in ((model, optimizer), (expected_model, expected)):
        train(each_model, each, *range(made_after))
    target = copy.deepcopy(model)
    for batch in range(3):
        optimizer.refresh(target)
        losses, _ = model.losses(batch)
        before = snapshot(model, optimizer)
        record, rotations = optimizer.last_step, [hook.capture.rotations for hook in hooks(target)]
        back_propagate(target.losses(batch)[0])
        assert optimizer.last_step is record
        assert all(each is not optimizer.rotations for each in rotations)
        assert_same(snapshot(model, optimizer), before)
        optimizer.zero_grad()
        optimizer.step(losses)  # of the previous forward pass
        train(expected_model, expected, batch)
        assert_same(snapshot(model, optimizer), snapshot(expected_model, expected))
    assert_moved(model, optimizer, snapshot(*wrap(rotation_size=4, **OPTIONS)))


class Shadow:
    """An average as a list of tensors, swapped into the model for evaluation, as torch_ema and diffusers do."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.shadow = [param.detach().clone() for param in self.params]

    def update(self) -> None:
        for shadow, param in zip(self.shadow, self.params, strict=True):
            shadow.copy_((shadow + param.detach()) / 2)

    def swap(self) -> None:
        for shadow, param in zip(self.shadow, self.params, strict=True):
            own = param.detach().clone()
            param.data.copy_(shadow)
            shadow.copy_(own)


def test_averages_that_are_swapped_in_predict_what_a_refreshed_copy_does() -> None:
    (model, optimizer), (undisturbed, expected) = wrap(**OPTIONS), wrap(**OPTIONS)
    x = model.inputs(9)
    train(model, optimizer, 0)
    train(undisturbed, expected, 0)
    averaged, shadow = COPIES["EMA"](model), Shadow(model)
    averaged.update_parameters(model)
    for batch in range(1, 4):
        train(model, optimizer, batch)
        train(undisturbed, expected, batch)
        averaged.update_parameters(model)
        shadow.update()
        optimizer.refresh(averaged)
        before = predict(model, x)
        shadow.swap()
        with pytest.warns(UserWarning, match="averages of weights, were written") if batch == 1 else nullcontext():
            predictions = predict(model, x)
        assert_same(predictions, predict(averaged, x))
        shadow.swap()
        assert_same(predict(model, x), before)
    assert_same(snapshot(model, optimizer), snapshot(undisturbed, expected))


def hooks(model: TwoTasks) -> list[Any]:
    return [hook for head in model.heads.values() for hook in head._forward_pre_hooks.values()]


def test_refreshing_the_model_itself_changes_nothing() -> None:
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0)
    before = snapshot(model, optimizer)
    optimizer.refresh(model)
    assert_same(snapshot(model, optimizer), before)
