"""Co-Tuning: the loss is a soft cross-entropy; the relationship is a mean per class, or an error that says why not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import CoTuningLoss, Relationship, co_tuning, lwf
from tests.contract.models import assert_same
from tests.regularization.networks import (
    COPIES,
    FEATURES,
    INPUTS,
    NUM_SOURCE,
    NUM_TARGET,
    Backbone,
    Elsewhere,
    state,
    train,
)
from tests.regularization.relationships import Batches, X, data, oracle, source_model
from tests.samplers import SEEDS


def logits_and_labels(seed: int, shape: tuple[int, int] = (4, 5)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return logits, labels.softmax(dim=1)


@given(seed=SEEDS, scale=st.floats(0, 20))
def test_loss_is_its_formula_and_torchs_cross_entropy(seed: int, scale: float) -> None:
    logits, target = logits_and_labels(seed)
    logits = (scale * logits).requires_grad_()
    total = 0.0
    for y, t in zip(logits.tolist(), target.tolist(), strict=True):
        log_sum = math.log(math.fsum(map(math.exp, y)))
        total -= math.fsum(p * (each - log_sum) for each, p in zip(y, t, strict=True))
    loss = CoTuningLoss()(logits, target)
    assert_close(loss.item(), total / len(logits), rtol=1e-12, atol=0.0)
    expected = F.cross_entropy(logits, target)
    assert_close(loss, expected, rtol=1e-12, atol=0.0)
    (grad,), (expected_grad,) = (torch.autograd.grad(each, logits) for each in (loss, expected))
    assert_close(grad, expected_grad, rtol=1e-10, atol=1e-15)
    assert_close(grad, (logits.softmax(dim=1) - target).detach() / 4, rtol=1e-10, atol=1e-15)


@given(seed=SEEDS)
def test_loss_does_not_depend_on_the_order(seed: int) -> None:
    logits, target = logits_and_labels(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(4, generator=generator), torch.randperm(5, generator=generator)
    permuted = CoTuningLoss()(logits[rows][:, columns], target[rows][:, columns])
    assert_close(permuted, CoTuningLoss()(logits, target), rtol=1e-12, atol=0.0)


def test_loss_gradcheck() -> None:
    logits, target = logits_and_labels(0)
    target[0] = F.one_hot(torch.tensor(2), 5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(CoTuningLoss(), (logits, target))
    assert torch.autograd.gradgradcheck(CoTuningLoss(), (logits, target))


def test_masked_source_classes_count_as_impossible() -> None:
    logits, target = logits_and_labels(0)
    logits[:, 1], target[:, 1] = -torch.inf, 0.0
    logits.requires_grad_()
    loss = CoTuningLoss()(logits, target)
    loss.backward()
    rest = [0, 2, 3, 4]
    assert_close(loss, F.cross_entropy(logits[:, rest], target[:, rest]), rtol=1e-12, atol=0.0)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_target_gets_no_gradient_and_nan_is_not_hidden() -> None:
    logits, target = (each.requires_grad_() for each in logits_and_labels(0))
    CoTuningLoss()(logits, target).backward()
    assert logits.grad is not None
    assert target.grad is None
    target.detach()[0, 0] = torch.nan
    assert CoTuningLoss()(logits, target).isnan()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    logits, target = logits_and_labels(0)
    logits, target = (30 * logits).to(dtype), target.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = CoTuningLoss()(logits, target)
    assert loss.dtype == torch.float32
    assert_same(loss, CoTuningLoss()(logits.float(), target))


@pytest.mark.parametrize("shapes", [((4, 5), (4, 1)), ((4, 5), (5,)), ((4, 5), (1, 5)), ((4, 5), (5, 4)), ((5,), (5,))])
def test_other_shapes_are_an_error(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"`input` and `target` must have the same shape \(b, N\), got"):
        CoTuningLoss()(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@given(seed=SEEDS, size=st.integers(NUM_TARGET, 30), batch_size=st.integers(1, 30))
def test_relationship_is_the_mean_prediction_of_each_class(seed: int, size: int, batch_size: int) -> None:
    x, labels = data(seed, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    x, labels = x[order], labels[order]
    batches = list(zip(torch.split(x, batch_size), torch.split(labels, batch_size), strict=True))
    relationship = Relationship(batches, source_model(), "cpu")
    assert relationship.relationship.dtype == torch.float32
    assert_close(relationship.relationship.double(), oracle(batches, source_model()), rtol=0.0, atol=1e-7)
    assert_close(relationship.relationship.sum(dim=1), torch.ones(NUM_TARGET))


@given(seed=SEEDS, num_classes=st.integers(1, 4), of_each=st.integers(1, 3), known=st.booleans())
def test_relationship_has_a_row_for_every_class(seed: int, num_classes: int, of_each: int, known: bool) -> None:
    """Also if a batch is empty."""
    torch.manual_seed(seed)
    labels = torch.arange(num_classes).repeat(of_each)
    whole = torch.randn(len(labels), INPUTS), labels
    empty = whole[0][:0], labels[:0]
    told = num_classes if known else None
    relationship = Relationship([empty, whole, empty], source_model(), "cpu", num_classes=told)
    assert_close(relationship.relationship.double(), oracle([whole], source_model()), rtol=0.0, atol=1e-7)


def test_model_and_relationship_are_on_the_device(tmp_path: Path) -> None:
    model, cache = Elsewhere(), tmp_path / "cache"
    assert Relationship([data()], model, "meta").relationship.is_meta
    Relationship([data()], model, "cpu", cache)
    assert Relationship([data()], model, "meta", cache).relationship.is_meta
    assert model.devices == ["meta", "cpu", "meta"]


def test_signature_is_that_of_tllib_plus_one_argument() -> None:
    parameters = inspect.signature(Relationship).parameters
    assert list(parameters) == ["data_loader", "classifier", "device", "cache", "num_classes"]


@pytest.mark.parametrize(
    "category",
    [1, [2, 0, 0], torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), np.array([0, 1]), torch.tensor(2)],
)
def test_rows_are_found_by_label(category: Any) -> None:
    relationship = Relationship([data()], source_model(), "cpu")
    expected = relationship.relationship[torch.as_tensor(category).long()]
    assert_same(relationship[category], expected)
    assert len(relationship) == NUM_TARGET


@pytest.mark.parametrize("category", [-1, 3, [0, 3], torch.tensor([-1, 0]), torch.tensor([5])])
def test_label_out_of_range_is_an_error_at_look_up(category: Any) -> None:
    relationship = Relationship([data()], source_model(), "cpu")
    with pytest.raises(ValueError, match=r"`labels` must be in 0\.\.2, got \[(-1|3|5)\]"):
        relationship[category]


@pytest.mark.parametrize("category", [torch.tensor([0.5]), torch.tensor([True, False])])
def test_invalid_labels_are_an_error_at_look_up(category: Tensor) -> None:
    with pytest.raises(ValueError, match="`labels` must be one class number per sample"):
        Relationship([data()], source_model(), "cpu")[category]


BAD_LABELS: dict[str, tuple[Batches, int | None, str]] = {
    "a class without samples": (
        [(X, torch.tensor([0, 2, 2]))],
        None,
        r"must have a sample, got none of class \[1\]. Either \(a\) the labels do not .* `num_classes` is too large",
    ),
    "a last class without": ([(X, torch.tensor([0, 1, 1]))], 4, r"got none of class \[2, 3\]"),
    "no sample": ([], None, "got none of class at all"),
    "no sample of classes that are known": ([], 2, "got none of class at all"),
    "a negative label": ([(X, torch.tensor([0, -1, 1]))], None, r"`labels` must not be negative, got \[-1\]"),
    "too large a label": ([(X, torch.tensor([0, 1, 2]))], 2, r"`labels` must be in 0\.\.1, got \[2\]"),
    "too many dimensions": ([(X, torch.tensor([[0], [1], [1]]))], None, r"of shape \(3,\), got torch.int64 of shape"),
    "too few labels": ([(X, torch.tensor([0, 1]))], None, r"of shape \(3,\), got torch.int64 of shape \(2,\)"),
    "no numbers": ([(X, torch.tensor([0.0, 1.0, 1.0]))], None, "must be one class number per sample"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels_are_an_error(name: str) -> None:
    batches, num_classes, message = BAD_LABELS[name]
    with pytest.raises(ValueError, match=message):
        Relationship(batches, source_model(), "cpu", num_classes=num_classes)


@pytest.mark.parametrize("make", [lwf.Classifier, co_tuning.Classifier])
def test_classifier_answers_with_its_source_head(make: Callable[..., lwf.Classifier]) -> None:
    classifier = make(Backbone(), NUM_TARGET, nn.Linear(FEATURES, NUM_SOURCE))
    parts = nn.Sequential(classifier.backbone, classifier.pool_layer, classifier.head_source)
    expected = Relationship([data()], parts, "cpu").relationship
    assert expected.shape == (NUM_TARGET, NUM_SOURCE)
    assert_same(Relationship([data()], classifier, "cpu").relationship, expected)
    with pytest.raises(ValueError, match=r"must map x to source logits .* Pass the Classifier itself"):
        Relationship([data()], nn.Sequential(classifier), "cpu")


def test_modes_of_all_parts_are_restored() -> None:
    model = source_model().train()
    model[0].eval()  # type: ignore[index]
    Relationship([data()], model, "cpu")
    assert [module.training for module in model.modules()] == [True, False, True, True]


def test_gradients_are_not_recorded() -> None:
    assert not Relationship([data()], source_model(), "cpu").relationship.requires_grad


@pytest.mark.parametrize("way", COPIES)
def test_relationship_round_trips(way: str) -> None:
    relationship, other = (Relationship([data(seed)], source_model(), "cpu") for seed in (0, 1))
    copied = COPIES[way](relationship)
    assert_same(state(copied), {"relationship": relationship.relationship})
    copied.relationship.zero_()
    assert relationship.relationship.any()
    other.load_state_dict(relationship.state_dict())
    assert_same(other[[0, 2]], relationship[[0, 2]])
    assert relationship.double()[[1]].dtype == torch.float64
    assert relationship.to("meta")[torch.tensor([0, 2, 2])].device.type == "meta"


def test_state_dict_of_other_classes_does_not_load() -> None:
    relationship, other = (Relationship([data()], model, "cpu") for model in (source_model(), nn.Linear(INPUTS, 2)))
    with pytest.raises(RuntimeError, match="size mismatch for relationship"):
        other.load_state_dict(relationship.state_dict())


def train_co_tuning(rotate: list[bool]) -> tuple[RotoGradOptimizer, list[dict[str, float]], bool]:
    torch.manual_seed(0)
    classifier = co_tuning.Classifier(Backbone(), NUM_TARGET, nn.Linear(FEATURES, NUM_SOURCE))
    x = torch.randn(32, INPUTS)
    labels = x[:, :NUM_TARGET].argmax(dim=1)
    relationship = Relationship([(x, labels)], classifier, "cpu")
    before = state(classifier.head_source)
    bare = torch.optim.SGD(classifier.get_parameters(0.1), momentum=0.9)
    optimizer = RotoGradOptimizer(bare, heads=classifier.heads, rotate=rotate, rotation_lr=0.02)

    def losses_of(batch: int) -> tuple[dict[str, Tensor], Tensor]:
        rep = classifier.represent(x)
        y_s, y_t = classifier.predict(rep)
        return {"source": CoTuningLoss()(y_s, relationship[labels]), "target": F.cross_entropy(y_t, labels)}, rep

    history = train(optimizer, losses_of, 60)
    moved = all(not torch.equal(now, before[key]) for key, now in state(classifier.head_source).items())
    return optimizer, history, moved


@pytest.mark.parametrize("rotate", [[True, True], [False, True]])
def test_both_heads_are_tasks(rotate: list[bool]) -> None:
    optimizer, history, source_head_moved = train_co_tuning(rotate)
    assert history[-1]["target"] < 0.7 * history[0]["target"]
    assert history[-1]["source"] < history[0]["source"]
    assert source_head_moved
    identity = torch.eye(FEATURES)
    assert [not torch.equal(matrix, identity) for matrix in optimizer.rotations.matrices] == rotate
