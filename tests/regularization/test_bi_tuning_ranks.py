"""Bi-Tuning on two processes equals Bi-Tuning on one with the joined batch, and both have the same queues."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from tests.contract.models import assert_same
from tests.distributed.ranks import COUNT, Ranks
from tests.regularization.bi_tuning_cases import batch, losses_of, make
from tests.regularization.networks import state

pytestmark = pytest.mark.distributed
SIZE, STEPS = 6, 5


def train(rank: int | None, wrapped: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Train on the part of a rank, or on the whole batch if None; return the state and the rotations."""
    bi_tuning = make(K=3)
    model: Any = bi_tuning
    if wrapped and rank is not None:
        model = DistributedDataParallel(bi_tuning)
    bare = SGD(bi_tuning.encoder_q.parameters(), lr=0.1, momentum=0.9)
    optimizer = RotoGradOptimizer(bare, heads=bi_tuning.encoder_q.heads, rotation_lr=0.05)
    part = slice(None) if rank is None else slice(rank * SIZE, (rank + 1) * SIZE)
    for step in range(STEPS):
        x_q, x_k, labels = (each[part] for each in batch(step, COUNT * SIZE))
        losses = losses_of(model(x_q, x_k, labels), labels)
        optimizer.zero_grad()
        optimizer.backward(losses)
        if rank is not None and not wrapped:
            for grad in [param.grad for param in bi_tuning.parameters() if param.grad is not None]:
                dist.all_reduce(grad.div_(COUNT))
        optimizer.step()
    return state(bi_tuning), optimizer.rotations.matrices.clone()


@pytest.mark.parametrize("wrapped", [False, True])
def test_two_processes_are_one(ranks: Ranks, wrapped: bool) -> None:
    """With DistributedDataParallel around the module, or with gradients averaged by the user."""
    first, second = ranks.run(train, wrapped)
    assert_same(first, second)
    assert_close(first, train(None), rtol=1e-9, atol=1e-9)


def start_differently(rank: int) -> dict[str, Tensor]:
    """The processes have different random numbers and samples; only the weights are the same."""
    bi_tuning = make()
    torch.manual_seed(rank)
    for step in range(3):
        bi_tuning(*batch(10 * step + rank))
    return {name: tensor for name, tensor in state(bi_tuning).items() if name.startswith("queue")}


def test_queues_are_the_same_on_all(ranks: Ranks) -> None:
    first, second = ranks.run(start_differently)
    assert first["queue_h"].any()
    assert_same(first, second)


def enqueue_in_a_group_of_one(rank: int) -> dict[str, Tensor]:
    groups = [dist.new_group([each]) for each in range(COUNT)]
    bi_tuning = make(process_group=groups[rank])
    bi_tuning(*batch(rank))
    return state(bi_tuning)


def test_process_group_is_respected(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks.run(enqueue_in_a_group_of_one)):
        alone = make()
        alone(*batch(rank))
        assert_same(found, state(alone))


def enqueue_batches_of_two_sizes(rank: int) -> str:
    bi_tuning = make()
    before = state(bi_tuning)
    with pytest.raises(ValueError, match="must have the same size") as error:
        bi_tuning(*batch(0, 4 + rank))
    assert_same(state(bi_tuning), before)
    return str(error.value)


def test_batches_of_two_sizes_are_an_error_on_all(ranks: Ranks) -> None:
    for message in ranks.run(enqueue_batches_of_two_sizes):
        assert "must have the same size, got [4, 5]" in message


def copy_it(rank: int) -> dict[str, Tensor]:
    bi_tuning = pickle.loads(pickle.dumps(make()))
    bi_tuning(*batch(rank))
    return state(bi_tuning)


def test_copies_also_exchange_their_keys(ranks: Ranks) -> None:
    first, second = ranks.run(copy_it)
    assert_same(first["queue_h"], second["queue_h"])
