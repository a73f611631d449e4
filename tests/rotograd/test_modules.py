"""Models of the official API: their outputs, parameters and options."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils._pytree import tree_leaves

from rotoopt.rotograd import RotateOnly, RotoGrad, VanillaMTL
from tests.asserts import assert_rotations
from tests.contract.models import assert_same
from tests.oracle import layout, rotate
from tests.rotograd.models import MODELS, D, K, any_model, losses_of, make, network, optimizers, train
from tests.samplers import SEEDS


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_method_and_the_network(name: str) -> None:
    model = make(name)
    own, networks = list(model.parameters()), list(model.model_parameters())
    assert [id(param) for param in model.mtl_parameters()] == [id(param) for param in own]
    assert len(own) == 1 + (name == "RotoGradNorm")
    backbone, heads = network()
    assert len(networks) == sum(len(list(module.parameters())) for module in (backbone, *heads))
    groups: list[dict[str, Any]] = [{"params": networks}, {"params": own, "lr": 1e-2}]
    Adam(groups)  # no parameter in both
    train(model, [], 0)
    assert all(param.grad is not None for param in (*own, *networks))
    model.zero_grad()
    assert all(param.grad is None for param in (*own, *networks))


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList])
def test_heads_of_the_caller_are_not_changed(kind: Callable[[list[nn.Module]], Any]) -> None:
    backbone, modules = network()
    heads = kind(modules)
    for _ in range(2):  # a second model with the same heads does not nest them
        model = RotoGrad(backbone, heads, D)
        assert list(heads) == modules
        assert not any(head._forward_pre_hooks for head in modules)
        assert len(model) == model.num_tasks == K
        train(model, [], 0)


def test_forward_without_gradients_in_training_mode() -> None:
    model = make("RotoGrad")
    with torch.no_grad():
        model(torch.zeros(4, 5))
    with pytest.raises(
        RuntimeError,
        match=r"^The model must be in training mode for backward\(\), got eval mode. Call model.train\(\)\.$",
    ):
        model.eval().backward(losses_of(model, 0))


def test_autocast_around_the_forward_pass_only() -> None:
    model = make("RotoGrad")
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, 0)
    model.backward(losses)
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_outputs_are_those_of_the_rotated_heads(mode: str) -> None:
    model = make("RotoGrad")
    train(model, optimizers(model), 0, 1)
    model.train(mode == "train")
    x = torch.randn(4, 5)
    outputs, rep = model(x), model.backbone(x)
    backbone, heads = network()
    del backbone
    for task, (head, matrix) in enumerate(zip(heads, model.rotation, strict=True)):
        head.load_state_dict(model.heads[task].head.state_dict())  # type: ignore[union-attr]
        torch.testing.assert_close(outputs[task], head(rep @ matrix.mT))
        assert_same(model[task](x), outputs[task])
        assert_same(model.heads[task](rep), outputs[task])
    if mode == "train":
        assert_same(model.rep, rep)


SHAPES = st.lists(st.integers(2, 3), min_size=1, max_size=2).map(tuple)


@given(leading=SHAPES, rotation_shape=SHAPES, post_shape=SHAPES | st.just(()), seed=SEEDS)
def test_dimensions_in_front_and_behind_are_positions(
    leading: tuple[int, ...], rotation_shape: tuple[int, ...], post_shape: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    model = RotateOnly(nn.Identity(), [nn.Identity() for _ in range(K)], rotation_shape, post_shape=post_shape)
    z = torch.randn(*leading, *rotation_shape, *post_shape)
    index = layout(z.shape, range(len(leading), len(leading) + len(rotation_shape)))
    for output, matrix in zip(model(z), model.rotation, strict=True):
        torch.testing.assert_close(output, rotate(z, matrix, index))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_evaluation_are_those_of_the_rotated_heads(name: str) -> None:
    model, x = make(name), torch.randn(4, 5)
    train(model, optimizers(model), 0, 1)
    model.eval()
    rep = model.backbone(x)
    heads: list[Any] = list(model.heads)
    by_hand = [head.head(rep @ matrix.mT) for head, matrix in zip(heads, model.rotation, strict=True)]
    results = model(x), by_hand
    params = list(model.model_parameters())
    found, expected = (torch.autograd.grad(torch.stack(outputs).square().sum(), params) for outputs in results)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["VanillaMTL", *MODELS])
def test_representation_is_the_latest_in_training(name: str) -> None:
    model = any_model(name)
    assert model.rep is None
    for batch in range(2):
        losses_of(model.eval(), 5)
        before = model.rep
        losses_of(model.train(), batch)
        assert model.rep is not before
        assert model.rep is not None
        expected = model.backbone(torch.randn(4, 5, generator=torch.Generator().manual_seed(batch)))
        assert_same(model.rep.detach(), expected.detach())
    assert copy.deepcopy(model).rep is None


class Pair(nn.Module):
    """Takes two inputs; returns the representation and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, D)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x) * mask, mask


class Two(nn.Module):
    """Returns its prediction and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 2)

    def forward(self, rep: Tensor) -> tuple[Tensor, str]:
        return self.linear(rep), "extra"


@pytest.mark.parametrize("make_model", [VanillaMTL, partial(RotoGrad, rotation_shape=D)])
def test_several_inputs_and_outputs(make_model: Callable[..., VanillaMTL]) -> None:
    model = make_model(Pair(), [Two(), nn.Linear(D, 2)])
    x, mask = torch.randn(4, 5), torch.ones(4, 1)
    predictions, extra = model(x, mask=mask)
    assert len(predictions) == 2
    assert extra[0] is mask
    assert extra[1:] == [("extra",)]
    model.backward([prediction.square().mean() for prediction in predictions])
    assert all(param.grad is not None for param in model.model_parameters())
    for output, _ in (model[0](x, mask), model[0](x, mask=mask)):
        assert_same(output, predictions[0])


@pytest.mark.parametrize(
    ("rotation_shape", "post_shape", "size"), [(4, (3, 3), 4), ((4, 3, 3), (), 36), (3, (3, 3), 3), ((4, 3), (3,), 12)]
)
def test_maps(rotation_shape: int | tuple[int, ...], post_shape: tuple[int, ...], size: int) -> None:
    torch.manual_seed(0)
    backbone = nn.Conv2d(2, 4, 3, padding=1)
    heads = [nn.Conv2d(4, 2, 3, padding=1) for _ in range(2)]
    model = RotoGrad(backbone, heads, rotation_shape, post_shape=post_shape)
    assert model.rotation[0].shape == (size, size)
    steppers = optimizers(model)
    for _ in range(3):
        predictions = model(torch.randn(5, 2, 3, 3))
        model.zero_grad()
        model.backward([(prediction - 1).square().mean() for prediction in predictions])
        for each in steppers:
            each.step()
    matrices = torch.stack(list(model.rotation))
    assert_rotations(matrices)
    rep = backbone(torch.randn(5, 2, 3, 3))
    if (rotation_shape, post_shape) == (4, (3, 3)):
        rotated = torch.einsum("ij,bjhw->bihw", matrices[0], rep)
        torch.testing.assert_close(model.heads[0](rep), heads[0](rotated))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casting_reaches_the_network_and_keeps_rotations(dtype: torch.dtype) -> None:
    model = make("RotoGradNorm").to(dtype)
    assert {param.dtype for param in model.model_parameters()} == {dtype}
    train(model, optimizers(model), 0, 1)
    matrices = torch.stack(list(model.rotation))
    assert matrices.dtype == torch.promote_types(dtype, torch.float32)
    assert_rotations(matrices.float())


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "post_shape": st.lists(st.integers(1, 3), max_size=2).map(tuple),
    "normalize_losses": st.booleans(),
    "burn_in_period": st.integers(0, 50),
}


@pytest.mark.parametrize("name", MODELS)
@example(rotation_shape=2, options={"post_shape": (2,), "normalize_losses": True, "burn_in_period": 3})
@given(
    rotation_shape=st.integers(2, 5) | st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    options=st.fixed_dictionaries({}, optional=OPTIONS),
)
def test_options_are_attributes(name: str, rotation_shape: int | tuple[int, ...], options: dict[str, Any]) -> None:
    """Options of the official package, with its defaults."""
    model = MODELS[name](*network(), rotation_shape, **options)
    shape = (rotation_shape,) if isinstance(rotation_shape, int) else rotation_shape
    expected = {"rotation_shape": shape, "post_shape": (), "normalize_losses": False, "burn_in_period": 20, **options}
    expected |= {"rotation_size": math.prod(shape), "num_tasks": K} | ({"alpha": 1.5} if name == "RotoGradNorm" else {})
    assert {option: getattr(model, option) for option in expected} == expected
    assert [tuple(matrix.shape) for matrix in model.rotation] == [(math.prod(shape),) * 2] * K


@pytest.mark.parametrize("name", MODELS)
def test_rotations_are_saved_once(name: str) -> None:
    model = make(name)
    train(model, optimizers(model), 0, 1)
    saved = [leaf for leaf in tree_leaves(dict(model.state_dict())) if isinstance(leaf, Tensor)]
    rotations = torch.stack(list(model.rotation))
    assert [torch.equal(leaf, rotations) for leaf in saved if leaf.shape == rotations.shape].count(True) == 1


@pytest.mark.parametrize("name", MODELS)
def test_rotations_start_at_random(name: str) -> None:
    matrices = torch.stack([*make(name).rotation, torch.eye(D)])
    assert_rotations(matrices)
    assert not torch.isclose(matrices[:, None], matrices).flatten(2).all(dim=2).triu(1).any()
