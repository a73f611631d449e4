"""Training models of the official API: same results as the optimizer, without the faults of the official package."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from rotoopt import EqualWeighting, RotoGradOptimizer, RotoGradWeighting
from rotoopt._rotation import coordinates
from rotoopt._rotation.cayley import turn_
from rotoopt.rotograd import RotoGradNorm, VanillaMTL, cached
from tests.asserts import assert_rotations
from tests.contract.models import assert_same
from tests.rotograd.models import BURN_IN, MODELS, D, K, any_model, losses_of, make, network, optimizers, train


def state(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(dict(model.state_dict()))


@pytest.mark.parametrize("normalize_losses", [False, True])
@pytest.mark.parametrize(("name", "weighting"), [("RotateOnly", EqualWeighting), ("RotoGrad", RotoGradWeighting)])
def test_model_and_optimizer_are_equivalent(name: str, weighting: Callable[[], Any], normalize_losses: bool) -> None:
    """From the same start, the module with two optimizers and the wrapper are bit-identical."""
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
def test_copies_train_identically_and_independently(name: str) -> None:
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


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_first_loss_does_not_affect_the_gradient(value: float) -> None:
    """The official package divides by L_k(0) itself: a negative one turns descent into ascent."""
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


def test_optimizer_that_changes_data_is_detected() -> None:
    model = make("RotateOnly")
    before = torch.stack(list(model.rotation)).clone()
    train(model, [], 0)
    for param in model.parameters():
        assert param.grad is not None
        param.data.sub_(0.1 * param.grad)
    assert not torch.equal(torch.stack(list(model.rotation)), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_record_of_a_backward_pass(dtype: torch.dtype) -> None:
    """The optimizer is unknown, and so are the angles of its updates."""
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


def test_coordinates_are_read_once_after_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because reading waits for the device."""
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


@pytest.mark.parametrize("name", MODELS)
def test_backbone_loss_is_added_unchanged(name: str) -> None:
    found = []
    for with_penalty in (False, True):
        model = make(name, normalize_losses=True)
        weight = next(model.backbone.parameters())
        model.backward(losses_of(model, 0), backbone_loss=weight.square().sum() if with_penalty else None)
        assert weight.grad is not None
        found.append(weight.grad - (2 * weight.detach() if with_penalty else 0))
    torch.testing.assert_close(*found)


def test_sgd_on_rotations_lowers_their_objective() -> None:
    """On one batch, the cosines between the task gradients increase."""
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
    """Such as ``retain_graph``."""
    for keeps in (False, True):
        model = any_model(name)
        model.backward(losses_of(model, 0), retain_graph=keeps)
        assert model.rep is not None
        with nullcontext() if keeps else pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(model.rep.sum(), list(model.backbone.parameters()))


def test_weights_of_gradnorm_are_positive_and_have_the_sum_of_the_tasks() -> None:
    model = make("RotoGradNorm")
    assert isinstance(model, RotoGradNorm)
    train(model, optimizers(model), 0, 1, 2)
    weights = torch.stack(list(model.weight))
    assert weights.shape == (K,)
    assert not weights.requires_grad
    assert weights.std() > 0.01  # they have moved
    torch.testing.assert_close(weights, K * model.weight_.detach().softmax(0).to(weights.dtype))
