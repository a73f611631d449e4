"""Recorded predictions belong to their samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from rotoopt.regularization import lwf
from rotoopt.regularization.lwf import record_logits
from tests.contract.models import assert_same
from tests.regularization.lwf_cases import inputs, make
from tests.regularization.networks import FEATURES, INPUTS, NUM_SOURCE, Backbone


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(*inputs(), strict=True)


IN_ORDER: dict[str, Callable[[TensorDataset], Any]] = {
    "DataLoader": lambda data: DataLoader(data, 3),
    "one by one": lambda data: DataLoader(data, 1, shuffle=False),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, False)),
    "iterable data set": lambda _: DataLoader(Stream(), 3),
    "list": lambda data: [data[:4], data[4:]],
    "inputs alone": lambda data: [data[:4][0], data[4:][0]],
    "generator": lambda data: (data[i : i + 2] for i in range(0, 7, 2)),
}


@pytest.mark.parametrize("name", IN_ORDER)
def test_rows_belong_to_samples(name: str) -> None:
    classifier, (x, labels) = make(), inputs()
    recorded = record_logits(IN_ORDER[name](TensorDataset(x, labels)), classifier, "cpu")
    assert_close(recorded, classifier.predict_source(x).detach())
    assert not recorded.requires_grad


OUT_OF_ORDER: dict[str, Callable[[TensorDataset], Any]] = {
    "shuffle": lambda data: DataLoader(data, 3, shuffle=True),
    "subset": lambda data: DataLoader(data, 3, sampler=SubsetRandomSampler([4, 2])),
    "drop_last": lambda data: DataLoader(data, 3, drop_last=True),
    "random batches": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 2, False)),
    "own batches": lambda data: DataLoader(data, batch_sampler=[[5, 1], [2, 0]]),
    "no batches": lambda data: DataLoader(data, batch_size=None, shuffle=True),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_loaders_that_do_not_keep_the_order_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must yield every sample once, in the order of the data set"):
        record_logits(OUT_OF_ORDER[name](TensorDataset(*inputs())), make(), "cpu")


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="must yield at least one batch, got none"):
        record_logits([], make(), "cpu")


def test_plain_source_model_is_recorded() -> None:
    classifier, (x, _) = make(), inputs()
    model = nn.Sequential(classifier.backbone, classifier.pool_layer, classifier.head_source)
    assert_same(record_logits([x], model, "cpu"), record_logits([x], classifier, "cpu"))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Identity(), make()),  # in eval mode, that is the target head
        nn.Flatten(0),
        nn.Unflatten(1, (2, 2)),
        nn.LSTM(INPUTS, 2),
        nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, -1))),
    ],
)
def test_what_does_not_return_source_logits_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"`classifier` must map x to source logits \(b, N\), got"):
        record_logits([inputs(size=8)[0]], model, "cpu")


@pytest.mark.parametrize("fails", [False, True])
def test_recording_gives_every_part_its_mode_back(fails: bool) -> None:
    classifier = lwf.Classifier(Backbone(), 2, nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, NUM_SOURCE)))
    classifier.train().head_source.eval()
    classifier.backbone[2].eval()  # type: ignore[index]
    modes = [module.training for module in classifier.modules()]
    x = inputs()[0]
    if fails:
        with pytest.raises(RuntimeError):
            record_logits([x, x[:, :1]], classifier, "cpu")
    else:
        first, second = (record_logits([x], classifier.train(), "cpu") for _ in range(2))
        assert_same(first, second)  # no dropout
        classifier.head_source.eval()
        classifier.backbone[2].eval()  # type: ignore[index]
    assert [module.training for module in classifier.modules()] == modes
