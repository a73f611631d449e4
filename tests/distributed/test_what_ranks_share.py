"""Collectives do not depend on data: bad batches on one rank cause no deadlock; process groups are respected."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rotoopt import GradNorm, RotoGradOptimizer
from rotoopt.rotograd import RotoGrad
from tests.distributed.ranks import Ranks
from tests.distributed.training import FEATURES, INPUTS, K, Model, Setup, train

pytestmark = pytest.mark.distributed


def wrap(**options: Any) -> tuple[Model, RotoGradOptimizer]:
    torch.manual_seed(0)
    model = Model()
    bare = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, RotoGradOptimizer(bare, heads=model.heads, burn_in_period=2, turn_every=1, **options)


def losses_of(model: torch.nn.Module, seed: int, *, factor: float = 1.0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs, rep = model(torch.randn(4, INPUTS, generator=generator))
    return [(output - 1).square().mean() * (factor if task == 0 else 1.0) for task, output in enumerate(outputs)], rep


def meet_a_bad_batch(rank: int, factor: float) -> list[Any]:
    model, optimizer = wrap(weighting=GradNorm(), rotation_lr=0.05)
    parallel = DistributedDataParallel(model)
    states = []
    for step in range(6):
        optimizer.zero_grad()
        bad = rank == 1 and step in (0, 3)
        optimizer.backward(*losses_of(parallel, 10 * step + rank, factor=factor if bad else 1.0))
        record = optimizer.last_step
        assert record is not None
        assert bool(record.finite) == (step not in (0, 3))
        if record.finite:  # the same on all ranks
            optimizer.step()
        states.append(copy.deepcopy(optimizer.state_dict()["rotograd"]))
    return states


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_bad_batch_on_one_rank_changes_nothing_on_any(ranks: Ranks, factor: float) -> None:
    first, second = ranks.run(meet_a_bad_batch, factor)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0, equal_nan=True)
    for before, after in ((None, first[0]), (first[2], first[3])):
        if before is None:
            assert after["norm_reference"]["values"].isnan().all()
        else:
            torch.testing.assert_close(after, before, rtol=0.0, atol=0.0, equal_nan=True)
    assert not torch.equal(first[-1]["matrices"], first[0]["matrices"])


def meet_a_bad_gradient(rank: int) -> list[Any]:
    model, optimizer = wrap()
    parallel = DistributedDataParallel(model)
    for step in range(4):
        optimizer.zero_grad()
        for number in range(2):
            with nullcontext() if number else parallel.no_sync():
                losses, rep = losses_of(parallel, 10 * step + 2 * number + rank)
                if rank == 1 and step == 3 and number == 0:
                    losses[0].register_hook(lambda grad: grad * float("nan"))  # type: ignore[no-untyped-call]
                optimizer.backward(losses, rep)
        for param in model.parameters():
            assert param.grad is not None
            param.grad.nan_to_num_(0.0)
        optimizer.step()
    state = optimizer.state_dict()["rotograd"]
    return [list(model.state_dict().values()), state["weighting"], state["weights"], state["matrices"]]


def test_gradient_that_is_not_finite_in_one_of_several_passes_on_one_rank(ranks: Ranks) -> None:
    """Its loss is finite."""
    first, second = ranks.run(meet_a_bad_gradient)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0, equal_nan=True)


def train_on_loaders_of_different_lengths(rank: int) -> tuple[int, list[Tensor]]:
    model, optimizer = wrap()
    parallel = DistributedDataParallel(model)
    begun = []

    def run() -> None:
        with Join([parallel], throw_on_early_termination=True):
            for step in range(3 + 2 * rank):
                begun.append(step)
                optimizer.zero_grad()
                optimizer.step(*losses_of(parallel, 10 * step + rank))

    with pytest.raises(RuntimeError, match="exhausted"):
        run()
    return len(begun), list(model.state_dict().values())


def test_join_ends_with_the_shortest_loader(ranks: Ranks) -> None:
    (short, first), (stopped, second) = ranks.run(train_on_loaders_of_different_lengths)
    assert (short, stopped) == (3, 4)  # in the forward pass of the fourth step
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def run_without_tasks(rank: int) -> list[Tensor]:
    model, optimizer = wrap()
    parallel = DistributedDataParallel(model)
    for step in range(3):
        optimizer.zero_grad()
        losses, rep = losses_of(parallel, 10 * step + rank)
        optimizer.step([loss * (1 - rank) for loss in losses], rep)
    return [*model.state_dict().values(), optimizer.rotations.matrices]


def test_rank_without_tasks_multiplies_its_losses_by_zero(ranks: Ranks) -> None:
    first, second = ranks.run(run_without_tasks)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def train_in_a_group_of_one(rank: int) -> Tensor:
    groups = [dist.new_group([each]) for each in range(dist.get_world_size())]
    model, optimizer = wrap(rotation_lr=0.05, process_group=groups[rank])
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step(*losses_of(model, 10 * step + rank))
    return optimizer.rotations.matrices


def test_process_group_is_respected(ranks: Ranks) -> None:
    for rank, matrices in enumerate(ranks.run(train_in_a_group_of_one)):
        model, optimizer = wrap(rotation_lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            optimizer.step(*losses_of(model, 10 * step + rank))
        torch.testing.assert_close(matrices, optimizer.rotations.matrices, rtol=0.0, atol=0.0)


def draw_haar(rank: int, rotation_size: int | None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank)
    model = Model()
    optimizer = RotoGradOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), heads=model.heads, init="haar", rotation_size=rotation_size
    )
    losses_of(model, rank)
    return optimizer.rotations.matrices, torch.rand(3)


@pytest.mark.parametrize("rotation_size", [None, 5])
def test_haar_start_is_the_same_on_all_ranks(ranks: Ranks, rotation_size: int | None) -> None:
    (first, own), (second, other) = ranks.run(draw_haar, rotation_size)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(own, other)  # the generator of each rank is not changed


def load_on_one_rank(rank: int) -> str:
    model, optimizer = wrap(rotation_size=5)
    if rank == 1:
        optimizer.rotations.load_matrices(torch.eye(5).flip(0).expand(K, 5, 5))
    try:
        optimizer.backward(*losses_of(model, rank))
    except RuntimeError as error:
        return str(error)
    return ""


def test_different_rotations_are_an_error_on_all_ranks(ranks: Ranks) -> None:
    for message in ranks.run(load_on_one_rank):
        assert "must be the same on all processes, got different ones. Either (a) a checkpoint was loaded" in message


class TwoSizes(torch.nn.Module):
    """Two tasks with tensors of different sizes; one of them runs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbones = torch.nn.ModuleList([torch.nn.Linear(INPUTS, 8), torch.nn.Linear(INPUTS, 6)])
        self.heads = torch.nn.ModuleList([torch.nn.Linear(8, 2), torch.nn.Linear(6, 2)])

    def forward(self, x: Tensor, task: int) -> Tensor:
        out: Tensor = self.heads[task](self.backbones[task](x))
        return out


def train_on_two_sizes(rank: int, rotate: Any) -> list[Any]:
    torch.manual_seed(0)
    model = TwoSizes()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = RotoGradOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.heads, rotate=rotate, turn_every=1)
    for step in range(4):
        task = (rank + step // 2) % 2
        optimizer.zero_grad()
        optimizer.step({f"heads[{task}]": parallel(torch.randn(4, INPUTS), task).square().mean()})
    return [list(model.state_dict().values()), optimizer.task_weights, optimizer.rotations.matrices]


@pytest.mark.parametrize("rotate", [True, [True, False], [False, True], False], ids=str)
def test_ranks_may_begin_with_tensors_of_different_sizes(ranks: Ranks, rotate: Any) -> None:
    first, second = ranks.run(train_on_two_sizes, rotate)
    torch.testing.assert_close(first[:2], second[:2], rtol=0.0, atol=0.0)
    if rotate is not False:
        torch.testing.assert_close(first[2], second[2], rtol=0.0, atol=0.0)
        assert len(first[2][0]) == (6 if rotate == [False, True] else 8)


def shard_too_late(rank: int) -> bool:
    model, optimizer = wrap()
    for head in model.heads:
        fully_shard(head)
    optimizer.backward(*losses_of(model, rank))
    assert optimizer.last_step is not None
    return optimizer.last_step.lagged


def test_heads_that_are_sharded_after_the_optimizer_was_built_get_separate_tensors(ranks: Ranks) -> None:
    """Weights then come from the previous step; if the optimizer is built last, from the same step."""
    assert ranks.run(shard_too_late) == [True, True]


def train_a_module(rank: int) -> list[Tensor]:
    network = Model()
    model = RotoGrad(network.backbone, network.heads, FEATURES)
    start = torch.stack(list(model.rotation))
    stepper = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(3):
        losses = losses_of(Outputs(model), 10 * step + rank)[0]
        stepper.zero_grad()
        model.backward(losses)
        stepper.step()
    return [start, torch.stack(list(model.rotation))]


class Outputs(torch.nn.Module):
    def __init__(self, model: RotoGrad) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        return self.model(x), self.model.rep


def test_rotations_of_the_module_api_stay_the_same_on_all_ranks(ranks: Ranks) -> None:
    first, second = ranks.run(train_a_module)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    assert not torch.equal(first[0], first[1])


def copy_it(rank: int) -> list[bool]:
    group = dist.new_group([0, 1])
    model, optimizer = wrap(process_group=group)
    model, copied = copy.deepcopy((model, optimizer))
    copied.step(*losses_of(model, 0))
    unpickled = pickle.loads(pickle.dumps(wrap()))
    unpickled[1].step(*losses_of(unpickled[0], 0))
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(optimizer)
    return [torch.equal(copied.rotations.matrices, unpickled[1].rotations.matrices)]


def test_copies_share_the_group(ranks: Ranks) -> None:
    assert ranks.run(copy_it) == [[True], [True]]


def train_and_resume(rank: int) -> list[Any]:
    states = []
    for interrupted in (False, True):
        model, optimizer = wrap(rotation_lr=0.05)
        parallel = DistributedDataParallel(model)
        for step in range(6):
            if interrupted and step == 3:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model, optimizer = wrap(rotation_lr=0.05)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                parallel = DistributedDataParallel(model)
            optimizer.zero_grad()
            optimizer.step(*losses_of(parallel, 10 * step + rank))
        states.append((list(model.state_dict().values()), optimizer.state_dict()))
    return states


def test_resumed_run_is_the_uninterrupted_one(ranks: Ranks) -> None:
    for uninterrupted, resumed in ranks.run(train_and_resume):
        torch.testing.assert_close(uninterrupted, resumed, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["default", "GradNorm"])
def test_ranks_do_not_drift_apart(ranks: Ranks, options: str) -> None:
    first, second = ranks.run(train, Setup(options), 1000)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
