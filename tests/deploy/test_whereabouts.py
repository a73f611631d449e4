"""Rotations are saved, loaded and copied with the weights: predictions do not change, or a warning is issued."""

import copy
import io
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from rotoopt import RotoGradOptimizer
from rotoopt._capture.whereabouts import checksums
from rotoopt.testing._branching import BRANCHING
from rotoopt.testing._branching.model import Sizes, built, inputs
from tests.branching.twins import NAMES
from tests.contract.models import TwoTasks, assert_same, sgd, train, wrap
from tests.samplers import SEEDS, Sampler

# Rotations far from I, updated in every step.
OPTIONS: dict[str, Any] = {"init": "haar", "rotation_optimizer": partial(SGD, lr=1.0)}
LOST = "loaded with the rotation that they were trained with, got a state dict without"
UNKNOWN = "got a dict without the metadata of model.state_dict()"
STALE = "A copy of the model should have the rotations that its weights were trained with"


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(model(x))


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


KEPT: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "file": through_a_file}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_the_best_weights_are_restored_with_their_rotations(keep: Callable[[Any], Any]) -> None:
    model, optimizer = wrap(**OPTIONS)
    x = model.inputs(9)
    train(model, optimizer, 0, 1)
    best, expected = keep(model.state_dict()), predict(model, x)
    assert list(best) == list(TwoTasks().state_dict())
    train(model, optimizer, 2, 3)
    model.load_state_dict(best)
    assert_same(predict(model, x), expected)
    train(model, optimizer, 4)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_weights_are_loaded_into_another_wrapped_model_with_their_rotations(
    keep: Callable[[Any], Any], trained: bool
) -> None:
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0, 1)
    other, its_optimizer = wrap()
    if trained:
        train(other, its_optimizer, 5)
    other.load_state_dict(keep(model.state_dict()))
    assert_same(predict(other, model.inputs(9)), predict(model, model.inputs(9)))


@pytest.mark.parametrize("init", ["haar", "identity"])  # those of heads without a common tensor stay I
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_any_model_are_loaded_with_their_rotations(name: str, init: Any) -> None:
    make, results = BRANCHING[NAMES.index(name)], []
    saved: list[Any] = []
    for seed in (0, 1):
        model = built(make, Sizes(), seed, torch.float64)
        bare = SGD(model.modules().parameters(), lr=0.01)
        optimizer = RotoGradOptimizer(bare, model.heads, init=init, **model.options)
        if seed == 0:
            optimizer.step(model.losses(inputs(0, 4, torch.float64)))
        for part in model.modules():
            part.load_state_dict(saved.pop(0)) if seed else saved.append(part.state_dict())
        model.modules().eval()
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(model.losses(inputs(1, 4, torch.float64)))
    assert_same(*results)
    model.modules().train()
    optimizer.step(model.losses(inputs(2, 4, torch.float64)))


@pytest.mark.parametrize("rotated", ["size", "rotate"])
def test_rotations_that_do_not_fit_are_an_error(rotated: str) -> None:
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0)
    options: dict[str, Any] = {"rotation_size": 4} if rotated == "size" else {"rotate": False}
    message = {"size": "a rotation of 6 features, and the current ones have 4", "rotate": "the task has rotate=False"}[
        rotated
    ]
    with pytest.raises(RuntimeError, match=message):
        wrap(**options)[0].load_state_dict(model.state_dict())
    remedy = re.escape("or (b) call fold() on that one, to merge the rotations into the heads.")
    with pytest.raises(ValueError, match=f"match their rotations from .* got left, where .*{message}.* {remedy}$"):
        RotoGradOptimizer(sgd(model.parameters()), model.heads, **options)
    train(model, optimizer, 1)


def changed_in_place(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As averaging does, or loading a checkpoint into the tensors of a state dict."""
    state = copy.deepcopy(state)
    for value in state.values():
        value.mul_(0.5)
    return state


def items_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("lose", ["items_of", "changed_in_place"])
@pytest.mark.parametrize("init", ["haar", "identity"])
def test_weights_without_rotations_are_reported_if_any_was_updated(init: Any, lose: str) -> None:
    model, optimizer = wrap(**{**OPTIONS, "init": init, "rotation_lr": 0.0})
    x = model.inputs(9)
    if init == "identity":
        optimizer = RotoGradOptimizer(sgd(model.parameters()), model.heads, rotation_lr=0.0)
    train(model, optimizer, 0)
    best = {"items_of": items_of, "changed_in_place": changed_in_place}[lose](model.state_dict())
    train(model, optimizer, 1)
    model.load_state_dict(best)
    if init == "haar":
        with pytest.warns(UserWarning, match=LOST) as record:
            predict(model, x)
        assert len(record) == 2  # heads
    predict(model, x)


def test_weights_without_rotations_are_reported_if_a_state_without_any_was_loaded() -> None:
    model, optimizer = wrap(**OPTIONS)
    optimizer.load_state_dict(optimizer.state_dict())
    predict(model, model.inputs(9))  # creates the rotations
    model.load_state_dict(items_of(model.state_dict()))
    with pytest.warns(UserWarning, match=LOST):
        predict(model, model.inputs(9))


def test_initial_weights_are_reported_until_the_optimizer_was_removed() -> None:
    """As in a cross-validation, which trains one model several times."""
    unwrapped = TwoTasks()
    initial, x = copy.deepcopy(unwrapped.state_dict()), unwrapped.inputs(9)
    model, optimizer = wrap(rotation_optimizer=partial(SGD, lr=1.0))
    train(model, optimizer, 0, 1)
    model.load_state_dict(initial)
    with pytest.warns(UserWarning, match=LOST + r".*\(c\).* cross-validation: call optimizer.remove\(\), load them"):
        predict(model, x)
    optimizer.remove()
    model.load_state_dict(initial)
    optimizer = RotoGradOptimizer(sgd(model.parameters()), model.heads)
    assert_same(predict(model, x), predict(unwrapped, x))


@pytest.mark.parametrize("then", ["nothing", "load the state"])
@pytest.mark.parametrize("how", ["load", "load items", "initialize", "train on"])
def test_weights_without_rotations_are_reported_by_the_next_optimizer(how: str, then: str) -> None:
    """Which takes over the rotations of the first one."""
    initial = copy.deepcopy(TwoTasks().state_dict())
    model, optimizer = wrap(rotation_optimizer=partial(SGD, lr=1.0))
    train(model, optimizer, 0, 1, 2)
    state = optimizer.state_dict()
    if how == "initialize":
        with torch.no_grad():
            for weight in model.heads.parameters():
                weight.normal_()
    elif how != "train on":
        model.load_state_dict(initial if how == "load" else items_of(initial))
    told = pytest.warns(UserWarning, match=r"\(c\).* fold of a cross-validation: call optimizer.remove\(\)")
    with told if how == "initialize" else nullcontext():
        second = RotoGradOptimizer(sgd(model.parameters()), model.heads, rotation_optimizer=partial(SGD, lr=1.0))
    if then == "load the state":
        second.load_state_dict(state)
    with told if how in ("load", "load items") and then == "nothing" else nullcontext():
        train(model, second, 3)


@pytest.mark.parametrize("turned", [True, False])
def test_weights_of_a_part_of_a_head_are_reported(turned: bool) -> None:
    """A state dict for every layer: none of them contains the rotation of the head."""
    torch.manual_seed(0)
    model = TwoTasks()
    model.heads["left"] = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.Tanh()), nn.Linear(4, 1))
    options = OPTIONS if turned else {"rotation_lr": 0.0}
    optimizer = RotoGradOptimizer(sgd(model.parameters()), model.heads, **options)
    x = model.inputs(9)
    train(model, optimizer, 0)
    whole, layers = copy.deepcopy(model.state_dict()), [model.heads["left"][0], model.heads["left"][1]]  # type: ignore[index]
    best = [copy.deepcopy(layer.state_dict()) for layer in layers]
    train(model, optimizer, 1)
    model.load_state_dict(whole)
    predict(model, x)
    train(model, optimizer, 2)
    for layer, saved in zip(layers, best, strict=True):
        layer.load_state_dict(layer.state_dict())
        predict(model, x)
        layer.load_state_dict(saved)
        with pytest.warns(UserWarning, match=LOST) if turned else nullcontext():
            predict(model, x)
        predict(model, x)
    optimizer.remove()
    assert not any(layer._load_state_dict_pre_hooks for layer in model.modules())


def test_weights_whose_counters_have_changed_have_their_rotations() -> None:
    """Like the counters of normalization layers whose statistics are recomputed."""
    model = TwoTasks()
    model.heads["left"] = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1))
    optimizer = RotoGradOptimizer(sgd(model.parameters()), model.heads, **OPTIONS)
    train(model, optimizer, 0)
    expected, saved = predict(model.eval(), model.inputs(9)), copy.deepcopy(model.state_dict())
    saved["heads.left.0.num_batches_tracked"] += 1
    train(model.train(), optimizer, 1)
    model.load_state_dict(saved)
    assert_same(predict(model.eval(), model.inputs(9)), expected)


def test_the_state_dict_itself_is_not_reported() -> None:
    """It references the weights, so loading it changes nothing."""
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0)
    alias = model.state_dict()
    train(model, optimizer, 1)
    expected = predict(model, model.inputs(9))
    model.load_state_dict(alias)
    assert_same(predict(model, model.inputs(9)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_a_state_dict_that_was_cast_has_its_rotations(dtype: torch.dtype, fresh: bool, own: torch.dtype) -> None:
    model, optimizer = wrap(**OPTIONS)
    model.to(own)
    z = torch.ones(1, 6, dtype=own)
    model.heads["left"](z).sum().backward()
    optimizer.rotations.load_matrices(torch.linalg.qr(torch.randn(2, 6, 6))[0])
    saved, expected = copy.deepcopy(model.state_dict()), optimizer.rotations.matrices.clone()
    for key in saved:
        saved[key] = saved[key].to(dtype)
    optimizer.rotations.load_matrices(torch.eye(6).repeat(2, 1, 1))
    if fresh:
        model, optimizer = wrap()
    model.load_state_dict(saved)
    assert_same(optimizer.rotations.matrices, expected)
    model.heads["left"](z.to(next(model.parameters())))


@pytest.mark.parametrize("state", [False, True])
def test_weights_that_were_averaged_are_reported_in_another_process(state: bool) -> None:
    """Until the state of the optimizer is loaded as well: the rotations there are I."""
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0)
    other, its_optimizer = wrap(rotation_optimizer=OPTIONS["rotation_optimizer"])
    other.load_state_dict(changed_in_place(model.state_dict()))
    if state:
        its_optimizer.load_state_dict(optimizer.state_dict())
    with nullcontext() if state else pytest.warns(UserWarning, match=LOST):
        predict(other, model.inputs(9))
    predict(other, model.inputs(9))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("init", ["identity", "haar"])
@pytest.mark.parametrize("state", [None, "before", "after"])
def test_items_of_a_state_dict_are_reported_in_another_process(state: str | None, init: Any, assign: bool) -> None:
    """They cannot tell whether the model that was saved had rotations, as its optimizer can."""
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0)
    weights, x = items_of(model.state_dict()), model.inputs(9)
    other, its_optimizer = wrap(**{**OPTIONS, "init": init})
    if state == "before":
        its_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(weights, assign=assign)
    if state == "after":
        its_optimizer.load_state_dict(optimizer.state_dict())
    if state is None:
        with pytest.warns(UserWarning, match=UNKNOWN) as record:
            predict(other, x)
        assert len(record) == 2  # heads
    else:
        assert_same(predict(other, x), predict(model, x))
    predict(other, x)


@pytest.mark.parametrize(
    "case", ["rotate=False", "another process", "before", "the backbone alone", "the same process"]
)
def test_weights_without_metadata_are_not_reported_if_nothing_can_be_lost(case: str) -> None:
    plain = TwoTasks()
    model = TwoTasks()
    if case == "before":
        model.load_state_dict(items_of(plain.state_dict()))
    flags = case != "rotate=False"
    optimizer = RotoGradOptimizer(sgd(model.parameters()), model.heads, rotate=flags, rotation_lr=0.0)
    if case == "another process":
        model.load_state_dict(through_a_file(plain.state_dict()))
    elif case == "the backbone alone":
        model.backbone.load_state_dict(items_of(plain.backbone.state_dict()))
    elif case == "rotate=False":
        model.load_state_dict(items_of(plain.state_dict()))
    elif case == "the same process":
        train(model, optimizer, 0)
        model.load_state_dict(items_of(model.state_dict()))
    train(model, optimizer, 1)


class Unit(nn.Module):
    """A head without parameters: an embedding that is compared with others."""

    def forward(self, z: Tensor) -> Tensor:
        return functional.normalize(z[:, :2], dim=1)


def with_unit() -> tuple[TwoTasks, RotoGradOptimizer]:
    torch.manual_seed(0)
    model = TwoTasks()
    model.heads["right"] = Unit()
    return model, RotoGradOptimizer(sgd(model.parameters()), model.heads, **OPTIONS)


def test_a_head_without_parameters_has_its_rotation() -> None:
    model, optimizer = with_unit()
    x = model.inputs(9)
    train(model, optimizer, 0)
    target, saved, expected = copy.deepcopy(model), copy.deepcopy(model.state_dict()), predict(model, x)
    train(model, optimizer, 1)
    other, _ = with_unit()
    for each in (model, other):
        each.load_state_dict(saved)
        assert_same(predict(each, x), expected)
    train(model, optimizer, 2)
    assert_same(predict(target, x), expected)
    for theirs, own in zip(target.parameters(), model.parameters(), strict=True):
        by_data(theirs, own)
    for report, run in ((STALE, partial(predict, target)), (LOST, partial(predict, model))):
        if report is LOST:
            model.load_state_dict(items_of(saved))
        with pytest.warns(UserWarning, match=report) as record:
            run(x)
        assert len(record) == 2  # heads
        run(x)
    target.load_state_dict(model.state_dict())
    predict(target, x)
    train(model, optimizer, 3)
    predict(target, x)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_weights_without_rotations_are_correct_with_the_state_of_the_optimizer(order: str) -> None:
    model, optimizer = wrap(**OPTIONS)
    x = model.inputs(9)
    train(model, optimizer, 0)
    weights, state, expected = items_of(model.state_dict()), copy.deepcopy(optimizer.state_dict()), predict(model, x)
    train(model, optimizer, 1)
    loads = [partial(model.load_state_dict, weights), partial(optimizer.load_state_dict, state)]
    for load in loads if order == "model first" else loads[::-1]:
        load()
    assert_same(predict(model, x), expected)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_initial_weights_are_correct_with_the_initial_state_of_the_optimizer(order: str) -> None:
    """From before the rotations existed: they are created as I by the first head, and not reported by the others."""
    model, optimizer = wrap(rotation_optimizer=partial(SGD, lr=1.0))
    x, weights, state = model.inputs(9), items_of(copy.deepcopy(model.state_dict())), optimizer.state_dict()
    expected = predict(copy.deepcopy(model), x)
    train(model, optimizer, 0, 1)
    loads = [partial(model.load_state_dict, weights), partial(optimizer.load_state_dict, state)]
    for load in loads if order == "model first" else loads[::-1]:
        load()
    assert_same(predict(model, x), expected)


def by_data(theirs: Tensor, own: Tensor) -> None:
    theirs.data = own.detach().clone()


def test_state_dicts_are_those_of_the_bare_model_after_remove() -> None:
    model, optimizer = wrap(**OPTIONS)
    train(model, optimizer, 0)
    optimizer.remove()
    state: Any = model.state_dict()
    assert all("rotoopt" not in entry for entry in state._metadata.values())


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8]


@given(dtype=st.sampled_from(DTYPES), shape=st.sampled_from([(1,), (7,), (3, 4)]), seed=SEEDS)
def test_every_bit_of_the_weights_counts(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    sampler = Sampler(seed)
    weight = (10 * sampler.normal(*shape)).to(dtype)
    other = weight.clone()
    other.view(BITS[dtype.itemsize]).flatten()[sampler.integer(weight.numel())] ^= 1
    tensors = [{"head.weight": each, "head.bias": torch.zeros(2)} for each in (weight, other, weight)]
    first, changed, again = (checksums(each, "head.") for each in tensors)
    assert first is not None
    assert changed is not None
    assert again is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, changed)


def test_numbers_of_batches_do_not_count() -> None:
    one, two = (checksums({"head.num_batches_tracked": torch.tensor(count)}, "head.") for count in (1, 2))
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)
