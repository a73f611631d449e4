"""Learning without forgetting as a task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import co_tuning, lwf
from rotoopt.regularization.lwf import distillation_loss, record_logits
from tests.contract.models import assert_same
from tests.regularization.lwf_cases import CLASSIFIERS, inputs, make
from tests.regularization.networks import FEATURES, INPUTS, NUM_SOURCE, NUM_TARGET, Backbone, state, train


def wrap(classifier: lwf.Classifier, **options: Any) -> RotoGradOptimizer:
    bare = torch.optim.SGD(classifier.get_parameters(0.1), momentum=0.9)
    return RotoGradOptimizer(bare, heads=classifier.heads, **{"rotate": [False, True]} | options)


def train_lwf(
    classifier: lwf.Classifier, optimizer: RotoGradOptimizer, recorded: Tensor, steps: int = 40
) -> list[dict[str, float]]:
    x, labels = inputs(size=32)

    def losses_of(batch: int) -> tuple[dict[str, Tensor], Tensor]:
        rep = classifier.represent(x)
        y_s, y_t = classifier.predict(rep)
        return {"source": distillation_loss(y_s, recorded, 3.0), "target": F.cross_entropy(y_t, labels)}, rep

    return train(optimizer, losses_of, steps)


def record(classifier: lwf.Classifier) -> Tensor:
    return record_logits([inputs(size=32)[0]], classifier, "cpu")


@pytest.mark.parametrize("bottleneck", [False, True])
def test_frozen_source_head_keeps_its_function(bottleneck: bool) -> None:
    classifier, (x, _) = make(bottleneck=bottleneck), inputs()
    before, rep = state(classifier), classifier.represent(x).detach()
    of_source, all_outputs = classifier.head_source(rep), [each.detach() for each in classifier(x)]
    optimizer = wrap(classifier, rotation_lr=0.1)
    assert_same([each.detach() for each in classifier(x)], all_outputs)  # the identity start
    history = train_lwf(classifier, optimizer, record(classifier))
    assert history[-1]["target"] < 0.9 * history[0]["target"]
    assert_same(classifier.head_source(rep), of_source)
    identity = torch.eye(FEATURES)
    assert_same(optimizer.rotations[0], identity)
    assert not torch.equal(optimizer.rotations[1], identity)
    for key, now in state(classifier).items():
        assert torch.equal(now, before[key]) == key.startswith("head_source")


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_heads_can_be_folded(name: str, bottleneck: bool) -> None:
    classifier, (x, _) = make(name, bottleneck=bottleneck), inputs()
    optimizer = wrap(classifier, rotate=True, init="haar")
    expected = [each.detach() for each in classifier(x)]
    optimizer.fold()
    assert_close([each.detach() for each in classifier(x)], expected)
    assert make(name, bottleneck=bottleneck).state_dict().keys() == classifier.state_dict().keys()


def test_evaluation_runs_the_rotated_target_head() -> None:
    classifier, (x, _) = make(), inputs()
    optimizer = wrap(classifier)
    train_lwf(classifier, optimizer, record(classifier), 3)
    y_t = classifier(x)[1]
    assert_same(classifier.eval()(x), y_t)


def test_resumed_run_is_the_uninterrupted_one() -> None:
    whole, first, resumed = make(), make(), make(seed=1)
    recorded = record(whole)
    train_lwf(whole, wrap(whole), recorded, 6)
    optimizer, other = wrap(first), wrap(resumed)
    train_lwf(first, optimizer, recorded, 3)
    resumed.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train_lwf(resumed, other, recorded, 3)
    assert_same(state(resumed), state(whole))


def pretrained(seed: int) -> tuple[lwf.Classifier, Tensor, Tensor]:
    """Return a classifier whose source head was trained, and data of another task on the same inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, INPUTS, generator=generator)
    source = (x @ torch.randn(INPUTS, NUM_SOURCE, generator=generator)).argmax(dim=1)
    target = (x.tanh() @ torch.randn(INPUTS, NUM_TARGET, generator=generator)).argmax(dim=1)
    classifier = co_tuning.Classifier(Backbone(), NUM_TARGET, nn.Linear(FEATURES, NUM_SOURCE))
    bare = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        bare.zero_grad()
        F.cross_entropy(classifier.predict_source(x), source).backward()  # type: ignore[no-untyped-call]
        bare.step()
    return lwf.Classifier(classifier.backbone, NUM_TARGET, classifier.head_source), x, target


@pytest.mark.parametrize("seed", range(5))
def test_distillation_that_starts_at_zero_does_not_stall_training(seed: int) -> None:
    """The common norm stays that of a task in training, also in the burn-in; the share only follows the loss."""
    torch.manual_seed(seed)
    classifier, x, labels = pretrained(seed)
    recorded = record_logits([x], classifier, "cpu")
    optimizer = wrap(classifier)
    losses = []
    for _ in range(20):
        y_s, y_t = classifier(x)
        losses.append(F.cross_entropy(y_t, labels))
        optimizer.zero_grad()
        optimizer.step([distillation_loss(y_s, recorded, 3.0), losses[-1]])
        assert optimizer.task_weights[1] > 0.03  # 0.04 to 0.9 in these runs, 0.003 to 0.02 in a stall
    assert losses[-1] < 0.7 * losses[0]
