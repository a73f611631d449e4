"""Key queues equal a loop over samples, without synchronization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rotoopt.regularization._key_queues import enqueue_
from tests.contract.models import assert_same
from tests.regularization.bi_tuning_oracle import Key, Ring, enqueue
from tests.samplers import SEEDS

BATCH_SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=6)


@given(seed=SEEDS, C=st.integers(1, 5), K=st.integers(1, 7), sizes=BATCH_SIZES, skewed=st.booleans())
@example(seed=0, C=3, K=2, sizes=[20, 20], skewed=True)  # the ring buffer of each class overflows several times
def test_queues_equal_a_loop(seed: int, C: int, K: int, sizes: list[int], skewed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    queues, pointers = [torch.zeros(2, C, K), torch.zeros(3, C, K)], torch.zeros(C, dtype=torch.long)
    rings: list[Ring] = [[None] * K for _ in range(C)]
    expected_pointers = [0] * C
    for size in sizes:
        h, z = torch.randn(size, 2, generator=generator), torch.randn(size, 3, generator=generator)
        labels = torch.randint(1 if skewed else C, (size,), generator=generator) + (C - 1 if skewed else 0)
        enqueue_(queues, pointers, [h, z], labels)
        enqueue(rings, expected_pointers, [Key(*each) for each in zip(h, z, strict=True)], labels.tolist())
        assert pointers.tolist() == expected_pointers
        for c, ring in enumerate(rings):
            for k, key in enumerate(ring):
                expected = (torch.zeros(2), torch.zeros(3)) if key is None else key
                assert_same((queues[0][:, c, k], queues[1][:, c, k]), tuple(expected))


@given(seed=SEEDS)
def test_order_within_other_classes_does_not_matter(seed: int) -> None:
    """Only the order of samples of the same class matters."""
    generator = torch.Generator().manual_seed(seed)
    keys, labels = torch.randn(12, 2, generator=generator), torch.randint(3, (12,), generator=generator)
    grouped = torch.cat([(labels == c).nonzero().flatten() for c in (2, 0, 1)])
    results: list[tuple[Tensor, Tensor]] = []
    for order in (torch.arange(12), grouped):
        results.append((torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.long)))
        enqueue_(results[-1][:1], results[-1][1], [keys[order]], labels[order])
    assert_same(*results)


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the writes to each position; a GPU may perform them in any order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "index_put" in str(func):
            _, (_, labels, slots), values = args[:3]
            self.slots.append((torch.stack([labels, slots], dim=1), values))
        return func(*args, **(kwargs or {}))


def test_all_writes_to_one_slot_are_equal() -> None:
    """On a GPU, any of several writes to one position may be the last."""
    torch.manual_seed(0)
    with Writes() as writes:
        enqueue_([torch.zeros(2, 3, 4)], torch.zeros(3, dtype=torch.long), [torch.randn(30, 2)], torch.arange(30) % 3)
    ((places, values),) = writes.slots
    assert len(values[0]) == 30
    for place in places:
        same = values[:, (places == place).all(dim=1)]
        assert same.shape[1] > 1
        assert_same(same, same[:, :1].expand_as(same))


def test_nothing_waits_for_the_device() -> None:
    queue, pointers = torch.zeros(2, 3, 4, device="meta"), torch.zeros(3, dtype=torch.long, device="meta")
    enqueue_([queue], pointers, [torch.zeros(30, 2, device="meta")], torch.zeros(30, dtype=torch.long, device="meta"))


def test_queues_keep_their_dtype_and_storage() -> None:
    queue, pointers = torch.zeros(2, 3, 4, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.long)
    before = queue.data_ptr(), pointers.data_ptr()
    enqueue_([queue], pointers, [torch.ones(1, 2)], torch.tensor([1]))
    assert (queue.data_ptr(), pointers.data_ptr()) == before
    assert queue[:, 1, 0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_is_an_error(label: int) -> None:
    """As on a GPU, where only the assertion of `gather` detects it."""
    queue, pointers = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        enqueue_([queue], pointers, [torch.ones(1, 2)], torch.tensor([label]))
    assert not queue.any()
    assert not pointers.any()
