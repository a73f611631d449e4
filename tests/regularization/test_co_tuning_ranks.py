"""Relationship on two processes, each with a part of the data: both get that of all data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rotoopt.regularization import Relationship
from tests.distributed.ranks import Ranks
from tests.regularization.relationships import data, source_model, split

pytestmark = pytest.mark.distributed
SIZES = (2, 10)  # rank 0 lacks the last class


def relate(rank: int, cache: Path | None = None, num_classes: int | None = None) -> Tensor:
    batches = split(*data(), *SIZES)[rank : rank + 1]
    return Relationship(batches, source_model(), "cpu", cache, num_classes=num_classes).relationship


@pytest.mark.parametrize("num_classes", [None, 3])
def test_relationship_is_that_of_all_data(ranks: Ranks, num_classes: int | None) -> None:
    first, second = ranks.run(relate, None, num_classes)
    assert_close(first, second, rtol=0.0, atol=0.0)
    assert_close(first, Relationship([data()], source_model(), "cpu").relationship)


def test_class_without_samples_is_an_error_on_all(ranks: Ranks) -> None:
    for message in ranks.run(relate_too_many):
        assert "got none of class [3]" in message


def relate_too_many(rank: int) -> str:
    with pytest.raises(ValueError, match="must have a sample") as error:
        relate(rank, num_classes=4)
    return str(error.value)


def relate_twice(rank: int, folder: Path) -> list[Tensor]:
    """The cache exists on rank 0 only, then on both."""
    cache = folder / str(rank)
    if rank == 0:
        torch.save({"relationship": torch.zeros(3, 5)}, cache)
    return [relate(rank, cache), Relationship([data(1)], source_model(), "cpu", cache).relationship]


def test_cache_is_used_if_all_ranks_have_it(ranks: Ranks, tmp_path: Path) -> None:
    expected = Relationship([data()], source_model(), "cpu").relationship
    for found in ranks.run(relate_twice, tmp_path):
        for each in found:
            assert_close(each, expected)
