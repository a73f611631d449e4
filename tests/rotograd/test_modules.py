"""The official package's API on our core: the same mathematics as the optimizer's, and none of the package's faults."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils._pytree import tree_leaves

from rotoopt import EqualWeighting, RotoGradOptimizer, RotoGradWeighting
from rotoopt._rotation import coordinates
from rotoopt._rotation.cayley import turn_
from rotoopt.rotograd import RotateOnly, RotoGrad, RotoGradNorm, VanillaMTL, cached
from tests.asserts import assert_rotations
from tests.contract.models import assert_same
from tests.oracle import layout, rotate
from tests.samplers import SEEDS

D, K = 6, 3
Model = RotateOnly | RotoGrad | RotoGradNorm
MODELS: dict[str, Callable[..., Model]] = {
    "RotateOnly": RotateOnly,
    "RotoGrad": RotoGrad,
    "RotoGradNorm": partial(RotoGradNorm, alpha=1.5),
}
BURN_IN = 3


def network() -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, D), nn.Tanh())
    return backbone, [nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(K)]


def any_model(name: str) -> VanillaMTL:
    return VanillaMTL(*network()) if name == "VanillaMTL" else make(name)


def make(name: str, **options: Any) -> Model:
    backbone, heads = network()
    torch.manual_seed(1)
    return MODELS[name](backbone, heads, D, burn_in_period=BURN_IN, **options)


def optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Return the two of the official README."""
    return [Adam(model.model_parameters(), lr=0.01), Adam(model.parameters(), lr=0.05)]


def losses_of(model: nn.Module, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    dtype = next(iter(model.backbone.parameters())).dtype  # type: ignore[union-attr]
    predictions = model(torch.randn(4, 5, generator=generator).to(dtype))
    return [(prediction - 1).square().mean() * 10.0**-task for task, prediction in enumerate(predictions)]


def train(model: Model, steppers: list[torch.optim.Optimizer], *batches: int) -> None:
    for batch in batches:
        losses = losses_of(model, batch)
        for each in steppers:
            each.zero_grad()
        model.backward(losses)
        for each in steppers:
            each.step()


def state(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(dict(model.state_dict()))


@pytest.mark.parametrize("normalize_losses", [False, True])
@pytest.mark.parametrize(("name", "weighting"), [("RotateOnly", EqualWeighting), ("RotoGrad", RotoGradWeighting)])
def test_model_and_optimizer_are_one_method(name: str, weighting: Callable[[], Any], normalize_losses: bool) -> None:
    """With the same start, the module with two optimizers does what the wrapping optimizer does, bit for bit."""
    model = make(name, normalize_losses=normalize_losses)
    backbone, heads = network()
    bare = Adam([param for module in (backbone, *heads) for param in module.parameters()], lr=0.01)
    optimizer = RotoGradOptimizer(
        bare,
        heads=heads,
        rotation_size=D,
        weighting=weighting(),
        normalize_losses=normalize_losses,
        burn_in_period=BURN_IN,
        rotation_optimizer=lambda params: Adam(params, lr=0.05),
    )
    optimizer.rotations.load_matrices(torch.stack(list(model.rotation)))
    steppers = optimizers(model)
    for batch in range(7):
        train(model, steppers, batch)
        generator = torch.Generator().manual_seed(batch)
        rep = backbone(torch.randn(4, 5, generator=generator))
        losses = [(head(rep) - 1).square().mean() * 10.0**-task for task, head in enumerate(heads)]
        optimizer.zero_grad()
        optimizer.step(losses, rep)
    assert_same(torch.stack(list(model.rotation)), optimizer.rotations.matrices)
    expected = [param for module in (backbone, *heads) for param in module.parameters()]
    assert_same([param.detach() for param in model.model_parameters()], [param.detach() for param in expected])
    assert_rotations(optimizer.rotations.matrices)


@pytest.mark.parametrize("cut", [1, BURN_IN, 5])
@pytest.mark.parametrize("name", MODELS)
def test_resumed_run_is_the_uninterrupted_one(name: str, cut: int) -> None:
    model = make(name, normalize_losses=True)
    steppers = optimizers(model)
    train(model, steppers, *range(cut))
    buffer = io.BytesIO()
    torch.save([model.state_dict(), *(each.state_dict() for each in steppers)], buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = make(name, normalize_losses=True)
    others = optimizers(resumed)
    train(resumed, others, 100, 101)
    resumed.load_state_dict(saved[0])
    for each, own in zip(others, saved[1:], strict=True):
        each.load_state_dict(own)
    train(model, steppers, 20, 21, 22)
    train(resumed, others, 20, 21, 22)
    assert_same(state(resumed), state(model))


@pytest.mark.parametrize("name", MODELS)
def test_copies_go_on_alike_and_apart(name: str) -> None:
    model = make(name)
    steppers = optimizers(model)
    train(model, steppers, 0, 1)
    model.rotation  # noqa: B018 - turn now, so that copies and original have nothing pending
    before = state(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = optimizers(copied)
        train(copied, own, 2)
        assert_same(state(model), before)
        reference = copy.deepcopy(model)
        train(reference, optimizers(reference), 2)
        assert_same(state(copied), state(reference))


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
def test_heads_of_the_caller_stay_as_they_are(kind: Callable[[list[nn.Module]], Any]) -> None:
    backbone, modules = network()
    heads = kind(modules)
    for _ in range(2):  # nothing is nested by a second model of the same heads
        model = RotoGrad(backbone, heads, D)
        assert list(heads) == modules
        assert not any(head._forward_pre_hooks for head in modules)
        assert len(model) == model.num_tasks == K
        train(model, [], 0)


def test_absent_task_has_no_gradient_of_an_earlier_batch() -> None:
    model = make("RotateOnly")
    train(model, [], 0)
    losses = losses_of(model, 1)
    model.zero_grad()
    model.backward([losses[0], None, losses[2]])
    others = list(model.backbone.parameters())
    fresh = losses_of(model, 1)
    expected = torch.autograd.grad(fresh[0] + fresh[2], others)
    torch.testing.assert_close([param.grad for param in others], list(expected))


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


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_first_loss_neither_flips_nor_poisons_a_gradient(value: float) -> None:
    """The official package divides by L_k(0) as it is: a negative one turns descent into ascent."""
    model = make("RotateOnly", normalize_losses=True)
    grads = []
    for shift in (None, value):
        model = make("RotateOnly", normalize_losses=True)
        first = losses_of(model, 0)
        offset = 0.0 if shift is None else shift - first[0].detach()
        model.backward([first[0] + offset, *first[1:]])
        model.zero_grad()
        model.backward(losses_of(model, 1))
        grads.append([param.grad for param in model.heads[0].parameters()])
    for plain, shifted in zip(*grads, strict=True):
        assert plain is not None
        assert shifted is not None
        cosine = torch.nn.functional.cosine_similarity(plain.flatten(), shifted.flatten(), dim=0)
        torch.testing.assert_close(cosine, torch.tensor(1.0))


def test_rotations_turn_once_per_step_and_not_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("RotoGrad")
    steppers = optimizers(model)
    turns: list[Tensor] = []

    def counted(matrices: Tensor, skew: Tensor) -> None:
        turns.append(skew)
        turn_(matrices, skew)

    monkeypatch.setattr(coordinates, "turn_", counted)
    train(model, [], 0, 1)  # no step
    assert not turns
    train(model, steppers, 0, 1, 2)
    assert len(turns) == 2  # before the second and the third forward pass
    model.eval()
    for _ in range(3):
        with cached():
            model(torch.zeros(4, 5))
    assert len(turns) == 3


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_several_backward_passes_add_up(name: str, set_to_none: bool) -> None:
    found = []
    for batches in ((0,), (1,), (0, 1)):
        model = make(name)
        train(model, [], 5)  # references
        model.zero_grad(set_to_none)
        for batch in batches:
            model.backward(losses_of(model, batch))
        grads = [param.grad for param in (*model.parameters(), *model.model_parameters())]
        found.append([grad for grad in grads if grad is not None])
    sums = [first + second for first, second in zip(found[0], found[1], strict=True)]
    torch.testing.assert_close(found[2], sums)


def test_optimizer_that_steps_on_data_is_seen() -> None:
    model = make("RotateOnly")
    before = torch.stack(list(model.rotation)).clone()
    train(model, [], 0)
    for param in model.parameters():
        assert param.grad is not None
        param.data.sub_(0.1 * param.grad)
    assert not torch.equal(torch.stack(list(model.rotation)), before)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_record_of_a_backward_pass(dtype: torch.dtype) -> None:
    """Who steps, and how far that turns the rotations, is not known."""
    torch.set_default_dtype(dtype)
    try:
        model = make("RotoGrad")
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.last_step is None
    train(model, optimizers(model), 0)
    record = model.last_step
    assert record is not None
    assert math.isnan(record.rotation_lr)
    assert_same([record.angles, record.total_angles], [torch.zeros(K, dtype=dtype)] * 2)


def test_coordinates_are_looked_at_once_after_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """That waits for the device."""
    model, x = make("RotoGrad"), torch.zeros(4, 5)
    looks: list[Tensor] = []

    def counted(param: Tensor) -> Tensor:
        looks.append(param)
        return torch.tensor(False)

    monkeypatch.setattr(nn.Parameter, "any", counted, raising=False)
    model(x)
    assert not looks
    train(model, [], 0)
    for _ in range(2):
        model(x)
        assert len(looks) == 1  # of the three heads, and of all calls


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


def test_vanilla_is_the_sum() -> None:
    model = VanillaMTL(*network())
    model.backward(losses_of(model, 0), backbone_loss=next(model.backbone.parameters()).square().sum())
    found = [param.grad for param in model.model_parameters()]
    model.zero_grad()
    penalty = next(model.backbone.parameters()).square().sum()
    expected = torch.autograd.grad(torch.stack([*losses_of(model, 0), penalty]).sum(), list(model.model_parameters()))
    torch.testing.assert_close(found, list(expected))
    assert list(model.parameters()) == []
    assert isinstance(model[0], nn.Module)


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


@pytest.mark.parametrize("name", MODELS)
def test_backbone_loss_is_added_as_it_is(name: str) -> None:
    found = []
    for with_penalty in (False, True):
        model = make(name, normalize_losses=True)
        weight = next(model.backbone.parameters())
        model.backward(losses_of(model, 0), backbone_loss=weight.square().sum() if with_penalty else None)
        assert weight.grad is not None
        found.append(weight.grad - (2 * weight.detach() if with_penalty else 0))
    torch.testing.assert_close(*found)


def test_sgd_on_rotations_lowers_their_objective() -> None:
    """On one batch, the cosines between the task gradients rise."""
    model = make("RotateOnly")
    stepper, alignments = SGD(model.parameters(), lr=0.2), []
    for _ in range(30):
        model.zero_grad()
        model.backward(losses_of(model, 0))
        stepper.step()
        record = model.last_step
        assert record is not None
        alignments.append(float(record.alignment.mean()))
    assert alignments[-1] > alignments[0] + 0.1


@pytest.mark.parametrize("name", ["VanillaMTL", *MODELS])
def test_losses_are_checked_and_may_have_names(name: str) -> None:
    found = []
    for named in (False, True):
        model = any_model(name)
        losses = losses_of(model, 0)
        with pytest.raises(ValueError, match="must have one entry per task, got 2 for 3 tasks"):
            model.backward(losses[:2])
        model.backward({f"heads[{task}]": loss for task, loss in enumerate(losses)} if named else losses)
        found.append([param.grad for param in model.model_parameters()])
    assert_same(*found)
    assert all(grad is not None for grad in found[0])


@pytest.mark.parametrize("name", ["VanillaMTL", *MODELS])
def test_backbone_loss_is_checked(name: str) -> None:
    model = any_model(name)
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(2,\) for `backbone_loss`"):
        model.backward(losses_of(model, 0), backbone_loss=torch.zeros(2))
    assert all(param.grad is None for param in model.model_parameters())


@pytest.mark.parametrize("name", ["VanillaMTL", *MODELS])
def test_options_of_autograd(name: str) -> None:
    """Such as the one that keeps the graph of the representation."""
    for keeps in (False, True):
        model = any_model(name)
        model.backward(losses_of(model, 0), retain_graph=keeps)
        assert model.rep is not None
        with nullcontext() if keeps else pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(model.rep.sum(), list(model.backbone.parameters()))


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "post_shape": st.lists(st.integers(1, 3), max_size=2).map(tuple),
    "normalize_losses": st.booleans(),
    "burn_in_period": st.integers(0, 50),
}


@pytest.mark.parametrize("name", MODELS)
@given(
    rotation_shape=st.integers(2, 5) | st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    options=st.fixed_dictionaries({}, optional=OPTIONS),
)
def test_options_are_attributes(name: str, rotation_shape: int | tuple[int, ...], options: dict[str, Any]) -> None:
    """Those of the official package, with its defaults."""
    model = MODELS[name](*network(), rotation_shape, **options)
    shape = (rotation_shape,) if isinstance(rotation_shape, int) else rotation_shape
    expected = {"rotation_shape": shape, "post_shape": (), "normalize_losses": False, "burn_in_period": 20, **options}
    expected |= {"rotation_size": math.prod(shape), "num_tasks": K} | ({"alpha": 1.5} if name == "RotoGradNorm" else {})
    assert {option: getattr(model, option) for option in expected} == expected
    assert [tuple(matrix.shape) for matrix in model.rotation] == [(math.prod(shape),) * 2] * K


def test_weights_of_gradnorm_are_positive_and_have_the_sum_of_the_tasks() -> None:
    model = make("RotoGradNorm")
    assert isinstance(model, RotoGradNorm)
    train(model, optimizers(model), 0, 1, 2)
    weights = torch.stack(list(model.weight))
    assert weights.shape == (K,)
    assert not weights.requires_grad
    assert weights.std() > 0.01  # they have moved
    torch.testing.assert_close(weights, K * model.weight_.detach().softmax(0).to(weights.dtype))


@pytest.mark.parametrize("name", MODELS)
def test_rotations_are_saved_once(name: str) -> None:
    model = make(name)
    train(model, optimizers(model), 0, 1)
    saved = [leaf for leaf in tree_leaves(dict(model.state_dict())) if isinstance(leaf, Tensor)]
    rotations = torch.stack(list(model.rotation))
    assert [torch.equal(leaf, rotations) for leaf in saved if leaf.shape == rotations.shape].count(True) == 1
