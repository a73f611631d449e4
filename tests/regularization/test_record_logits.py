"""Recorded predictions are in the order of their samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
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
from tests.regularization.networks import FEATURES, INPUTS, NUM_SOURCE, Backbone, Elsewhere


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(*inputs(), strict=True)


IN_ORDER: dict[str, Callable[[TensorDataset], Any]] = {
    "DataLoader": lambda data: DataLoader(data, 3),
    "one by one": lambda data: DataLoader(data, 1, shuffle=False),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, False)),
    "batches of the data set": lambda data: DataLoader([data[:4], data[4:]], batch_size=None),  # type: ignore[arg-type]
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


OUT_OF_ORDER: dict[str, tuple[Callable[[TensorDataset], Any], str]] = {
    "shuffle": (lambda data: DataLoader(data, 3, shuffle=True), "RandomSampler and drop_last=False"),
    "subset": (
        lambda data: DataLoader(data, 3, sampler=SubsetRandomSampler([4, 2])),
        "SubsetRandomSampler and drop_last=False",
    ),
    "drop_last": (lambda data: DataLoader(data, 3, drop_last=True), "SequentialSampler and drop_last=True"),
    "random batches": (
        lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 2, False)),
        "RandomSampler and drop_last=False",
    ),
    "own batches": (lambda data: DataLoader(data, batch_sampler=[[5, 1], [2, 0]]), "list and drop_last=False"),
    "no batches": (lambda data: DataLoader(data, batch_size=None, shuffle=True), "RandomSampler and drop_last=False"),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_loaders_that_do_not_keep_the_order_are_rejected(name: str) -> None:
    loader, found = OUT_OF_ORDER[name]
    message = (
        rf"^`data_loader` must yield every sample once, in the order of the data set, .* got one with a {found}. "
        r"Record with another loader: DataLoader\(dataset, batch_size, shuffle=False\)"
    )
    with pytest.raises(ValueError, match=message):
        record_logits(loader(TensorDataset(*inputs())), make(), "cpu")


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^`data_loader` must yield at least one batch, got none"):
        record_logits([], make(), "cpu")


def test_model_runs_on_the_device_and_logits_are_on_the_cpu() -> None:
    model = Elsewhere()
    assert_same(record_logits([inputs()[0]], model, "meta"), torch.zeros(7, NUM_SOURCE))
    assert model.devices == ["meta"]


def test_plain_source_model_is_recorded() -> None:
    classifier, (x, _) = make(), inputs()
    model = nn.Sequential(classifier.backbone, classifier.pool_layer, classifier.head_source)
    assert_same(record_logits([x], model, "cpu"), record_logits([x], classifier, "cpu"))


@pytest.mark.parametrize(
    ("model", "found"),
    [
        # In eval mode, that is the target head.
        (nn.Sequential(nn.Identity(), make()), r"\(8, 3\) for 8 samples from a Sequential"),
        (nn.Flatten(0), r"\(32,\) for 8 samples from a Flatten"),
        (nn.Unflatten(1, (2, 2)), r"\(8, 2, 2\) for 8 samples from a Unflatten"),
        (nn.LSTM(INPUTS, 2), r"tuple for 8 samples from a LSTM"),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, -1))), r"\(2, 16\) for 8 samples from a Sequential"),
    ],
)
def test_model_that_does_not_return_source_logits_is_an_error(model: nn.Module, found: str) -> None:
    message = (
        rf"`classifier` must map x to source logits \(b, N\), got {found}. Pass .* or nn.Sequential\(classifier.back"
    )
    with pytest.raises(ValueError, match=message):
        record_logits([inputs(size=8)[0]], model, "cpu")


@pytest.mark.parametrize("fails", [False, True])
def test_recording_restores_the_modes_of_all_parts(fails: bool) -> None:
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
