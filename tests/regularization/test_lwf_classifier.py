"""The classifiers of LWF and Co-Tuning."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from rotoopt.regularization import lwf
from tests.contract.models import assert_same
from tests.regularization.lwf_cases import CLASSIFIERS, inputs, make
from tests.regularization.networks import COPIES, FEATURES, NUM_SOURCE, NUM_TARGET, Backbone
from tests.samplers import SEEDS


def test_signature_is_that_of_tllib() -> None:
    names = ["backbone", "num_classes", "head_source", "head_target", "bottleneck", "bottleneck_dim", "finetune"]
    assert list(inspect.signature(lwf.Classifier).parameters) == [*names, "pool_layer"]


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_outputs_are_those_of_the_parts(name: str, bottleneck: bool) -> None:
    classifier, (x, _) = make(name, bottleneck=bottleneck), inputs()
    f = classifier.backbone(x)
    y_s, y_t = classifier(x)
    assert_same(y_s, classifier.head_source(f))
    assert_same(y_t, classifier.head_target(classifier.bottleneck(f)))
    assert_same(classifier.predict(classifier.represent(x)), (y_s, y_t))
    assert_same(classifier.predict_source(x), y_s)
    assert_same(classifier.eval()(x), y_t)
    assert y_t.shape == (7, NUM_TARGET)
    assert classifier.features_dim == (4 if bottleneck else FEATURES)


@pytest.mark.parametrize("name", CLASSIFIERS)
@given(seed=SEEDS, bottleneck_dim=st.integers(1, 5))
def test_given_parts_are_used(name: str, seed: int, bottleneck_dim: int) -> None:
    torch.manual_seed(seed)
    pool, head = nn.Linear(FEATURES, FEATURES), nn.Linear(bottleneck_dim, NUM_TARGET)
    bottleneck, source = nn.Linear(FEATURES, bottleneck_dim), nn.Linear(FEATURES, NUM_SOURCE)
    classifier = CLASSIFIERS[name](Backbone(), NUM_TARGET, source, head, bottleneck, bottleneck_dim, pool_layer=pool)
    x, _ = inputs()
    f = pool(classifier.backbone(x))
    assert_same(classifier(x), (source(f), head(bottleneck(f))))
    assert (classifier.num_classes, classifier.features_dim) == (NUM_TARGET, bottleneck_dim)


def test_keys_of_the_state_dict_are_those_of_tllib() -> None:
    modules = {key.split(".")[0] for key in make(bottleneck=True).state_dict()}
    assert modules == {"backbone", "bottleneck", "head_source", "head_target"}


def test_default_pooling_is_the_mean_over_positions() -> None:
    class Maps(nn.Conv2d):
        out_features = FEATURES

    classifier = lwf.Classifier(Maps(2, FEATURES, 3), NUM_TARGET, nn.Linear(FEATURES, NUM_SOURCE))
    x = torch.randn(3, 2, 5, 6)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())(classifier.backbone(x))
    assert_close(classifier.represent(x), pooled)


@pytest.mark.parametrize("shape", [(FEATURES, 4, 4), (2, 7, FEATURES), (2, FEATURES, 3, 3, 3)])
def test_default_pooling_rejects_all_but_maps_and_vectors(shape: tuple[int, ...]) -> None:
    backbone = nn.Identity()
    backbone.out_features = FEATURES  # type: ignore[assignment]
    head = nn.Linear(FEATURES, NUM_SOURCE)
    message = (
        r"must return vectors \(b, c\) or maps \(b, c, h, w\), got .*\. Pass a `pool_layer` .*, or nn.Identity\(\)"
    )
    with pytest.raises(ValueError, match=message):
        lwf.Classifier(backbone, NUM_TARGET, head)(torch.randn(shape))
    tokens = lwf.Classifier(backbone, NUM_TARGET, head, pool_layer=nn.Identity())
    assert tokens(torch.randn(2, 7, FEATURES))[1].shape == (2, 7, NUM_TARGET)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head_source": None}, TypeError, "`head_source` must be the head of the source model, got None"),
        ({"bottleneck": nn.Linear(6, 4)}, ValueError, "`bottleneck_dim` must be the number of features"),
        ({"head_target": nn.Linear(6, 2)}, ValueError, "`head_target` must have num_classes=3 outputs"),
        (
            {"backbone": nn.Tanh()},
            ValueError,
            "`backbone` must have the number of features after pooling .* out_features=None. Set it, as in",
        ),
    ],
)
def test_mismatches_are_an_error_at_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    fitting: dict[str, Any] = {"backbone": Backbone(), "num_classes": 3, "head_source": nn.Linear(6, 5)}
    with pytest.raises(error, match=message):
        lwf.Classifier(**{**fitting, **options})


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_parameter_groups(name: str, finetune: bool) -> None:
    """Every trainable parameter is in one group: the new layers at the base rate, pretrained ones at a tenth."""
    pool = nn.Linear(FEATURES, FEATURES)
    bottleneck, head = nn.Linear(FEATURES, 4), nn.Linear(FEATURES, NUM_SOURCE)
    classifier = CLASSIFIERS[name](Backbone(), NUM_TARGET, head, None, bottleneck, 4, finetune, pool)
    rates = {id(param): group["lr"] for group in classifier.get_parameters(0.5) for param in group["params"]}
    new = ("bottleneck", "head_target")
    trainable = {key: param for key, param in classifier.named_parameters() if param.requires_grad}
    assert {key.split(".")[0] for key in trainable} == {
        *("backbone", "pool_layer", *new),
        *(["head_source"] if name == "Co-Tuning" else []),
    }
    assert len(rates) == len(trainable)
    for key, param in trainable.items():
        assert rates[id(param)] == pytest.approx(0.05 if finetune and not key.startswith(new) else 0.5)
    torch.optim.SGD(classifier.get_parameters(0.5))
    assert {group["lr"] for group in classifier.get_parameters()} == ({0.1, 1.0} if finetune else {1.0})


def test_source_head_accumulates_no_gradients() -> None:
    classifier, (x, labels) = make(), inputs()
    for _ in range(3):
        y_s, y_t = classifier(x)
        (y_s.sum() + F.cross_entropy(y_t, labels)).backward()
    assert all(param.grad is None for param in classifier.head_source.parameters())
    assert all(param.grad is not None for param in classifier.backbone.parameters())


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_round_trips(name: str, way: str, bottleneck: bool) -> None:
    classifier, (x, _) = make(name, bottleneck=bottleneck), inputs()
    copied = COPIES[way](classifier)
    assert_same(copied(x), classifier(x))
    loaded = make(name, bottleneck=bottleneck, seed=1)
    loaded.load_state_dict(classifier.state_dict())
    assert_same(loaded(x), classifier(x))
    assert not {id(param) for param in copied.parameters()} & {id(param) for param in classifier.parameters()}
    assert copied.heads["source"] is copied.head_source
    assert all(each.dtype == torch.float64 for each in copied.double()(x.double()))
