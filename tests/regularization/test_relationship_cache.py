"""Co-Tuning: the file of a relationship, and errors for one that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rotoopt.regularization import Relationship
from tests.contract.models import assert_same
from tests.regularization.networks import (
    INPUTS,
    NUM_TARGET,
)
from tests.regularization.relationships import Batches, X, data, source_model


def test_cache_is_the_file_of_that_name(tmp_path: Path) -> None:
    cache = tmp_path / "relationship"
    first = Relationship([data()], source_model(), "cpu", str(cache))
    assert [path.name for path in tmp_path.iterdir()] == ["relationship"]
    again = Relationship([data(1)], source_model(), "cpu", cache, num_classes=NUM_TARGET)  # other data
    assert_same(again.relationship, first.relationship)
    again.load_state_dict(torch.load(cache, weights_only=True))


STALE: dict[str, tuple[Batches, nn.Module, int | None]] = {
    "other source classes": ([data()], nn.Linear(INPUTS, 2), None),
    "other target classes": ([data()], source_model(), 4),
    "more target classes": ([(X, torch.tensor([0, 3, 1]))], source_model(), None),
}


@pytest.mark.parametrize("name", STALE)
def test_cache_of_other_classes_is_an_error(name: str, tmp_path: Path) -> None:
    cache = tmp_path / "relationship"
    Relationship([data()], source_model(), "cpu", cache)
    batches, model, num_classes = STALE[name]
    message = r"`cache` must be of \d target and \d source classes, got \(3, 5\) in .* or other data: delete it"
    with pytest.raises(ValueError, match=message):
        Relationship(batches, model, "cpu", cache, num_classes=num_classes)


@pytest.mark.parametrize(("content", "reason"), [(b"", "EOFError"), (b"\x93NUMPY\x01\x00v\x00", "UnpicklingError")])
def test_cache_of_another_kind_is_an_error(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "cache.npy").write_bytes(content)
    message = rf"`cache` must be a file that a Relationship saved, got '.*cache.npy' \({reason}\). Delete it, or"
    with pytest.raises(ValueError, match=message):
        Relationship([data()], source_model(), "cpu", tmp_path / "cache.npy")


def test_cache_without_a_matrix_is_an_error(tmp_path: Path) -> None:
    torch.save({"relationship": [[0.5, 0.5]]}, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"`cache` must be a file that .* \(AttributeError\)"):
        Relationship([data()], source_model(), "cpu", tmp_path / "cache")


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "`data_loader` must have a batch"), ([(X, torch.tensor([0, -1, 1]))], "`labels` must not be negative")],
)
def test_data_is_checked_even_if_a_cache_is_used(batches: Batches, message: str, tmp_path: Path) -> None:
    Relationship([data()], source_model(), "cpu", tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        Relationship(batches, source_model(), "cpu", tmp_path / "cache")


def test_cache_runs_no_code(tmp_path: Path) -> None:
    matrix = Relationship([data()], source_model(), "cpu").relationship
    torch.save({"relationship": matrix, "more": source_model()}, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"`cache` must be a file that .* \(UnpicklingError\)"):
        Relationship([data()], source_model(), "cpu", tmp_path / "cache")


def test_nothing_is_cached_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have a sample"):
        Relationship([data()], source_model(), "cpu", tmp_path / "relationship", num_classes=4)
    assert not list(tmp_path.iterdir())
