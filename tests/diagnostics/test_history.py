"""A history contains the records, does not slow down training, and keeps nothing large alive."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rotoopt import RotoGradOptimizer, StepRecord
from rotoopt._engine.construction import modules_of
from rotoopt.diagnostics import History, _history, scalars
from rotoopt.diagnostics._measurements import Measured
from rotoopt.rotograd import RotoGrad
from tests.contract.models import TwoTasks, assert_same, back_propagate, sgd, snapshot, train, wrap
from tests.diagnostics.fakes import FakeOptimizer, random_history
from tests.samplers import NUM_TASKS, SEEDS, Bench, Sampler

MOVE_EVERY = 4


@pytest.fixture(autouse=True, scope="module")
def frequent_moves() -> Iterator[None]:
    """Move records to the CPU often, so that few records suffice to test it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_history, "MOVE_EVERY", MOVE_EVERY)
        yield


@given(K=NUM_TASKS, T=st.integers(1, 3 * MOVE_EVERY), seed=SEEDS)
def test_dict_equals_the_records(K: int, T: int, seed: int) -> None:
    bench, sampler, recorded = Bench((3, 4), K, torch.float32), Sampler(seed, torch.float32), History()
    records: list[StepRecord] = []
    for _ in range(T):
        absent = sampler.uniform(K) < 0.3
        absent[sampler.integer(K)] = False
        grads = sampler.normal(K, 3, 4)
        if sampler.integer(4) == 0:
            grads[(~absent).nonzero()[0]] = torch.inf
        bench.step([None if absent[task] else grad for task, grad in enumerate(grads)])
        recorded.record(bench.optimizer)
        records.append(bench.record)
    assert len(recorded) == T
    values = recorded.to_dict()
    for step, record in enumerate(records):
        present = record.present
        for name in ("present", "finite", "angles", "total_angles"):
            assert_same(values[name][step], getattr(record, name))
        for name in ("losses", "grad_norms", "weights"):
            assert_same(values[name][step, present], getattr(record, name)[present])
            assert values[name][step, ~present].isnan().all()
        assert_same(values["cosines"][step][present][:, present], record.cosines[present][:, present])
        assert values["cosines"][step, ~present].isnan().all()
        assert values["cosines"][step][:, ~present].isnan().all()
        assert values["step"][step] == record.step
        assert values["rotation_lr"][step] == record.rotation_lr
        if record.finite:
            assert_close(values["alignment"][step, present], record.alignment[present])
            assert values["alignment"][step, ~present].isnan().all()
            assert_close(values["conflict_rate"][step], record.conflict_rate)
        else:
            assert values["alignment"][step].isnan().all()
            assert values["conflict_rate"][step].isnan()


def test_recording_changes_no_bit() -> None:
    states = []
    for recorded in (History(), None):
        model, optimizer = wrap(rotation_lr=0.1)
        for batch in range(2 * MOVE_EVERY + 1):
            train(model, optimizer, batch)
            if recorded is not None:
                recorded.record(optimizer)
                scalars(optimizer)
        states.append(snapshot(model, optimizer))
    assert_same(*states)


def test_unknown_losses_are_nan() -> None:
    model, optimizer = wrap()
    recorded = History()
    for batch in range(2):
        back_propagate(model.losses(batch)[0])
        optimizer.step()
        recorded.record(optimizer)
    values = recorded.to_dict()
    assert values["losses"].isnan().all()
    assert values["grad_norms"].isfinite().all()


def test_learning_rate_in_a_tensor_is_that_of_the_step() -> None:
    recorded, optimizer, rate = History(), FakeOptimizer(["a"]), torch.tensor(1.0)
    for _ in range(3):
        recorded.record(optimizer.step(rotation_lr=rate))
        rate /= 2
    assert recorded.to_dict()["rotation_lr"].tolist() == [1.0, 0.5, 0.25]


def test_angles_of_rotations_that_the_user_updates_are_unknown() -> None:
    model, recorded = RotoGrad(nn.Linear(3, 4), [nn.Linear(4, 1), nn.Linear(4, 2)], 4), History()
    model.backward([output.square().mean() for output in model(torch.randn(5, 3))])
    recorded.record(model)
    values = recorded.to_dict()
    assert values["angles"].isnan().all()
    assert values["total_angles"].isnan().all()
    assert not any("angle" in name for name in scalars(model))


MOVES = [
    {"dtype": torch.float64},
    pytest.param({"device": "cuda"}, marks=pytest.mark.cuda),
]


@pytest.mark.parametrize("move", MOVES, ids=str)
def test_network_may_move(move: dict[str, Any]) -> None:
    recorded, optimizer = History(), FakeOptimizer(["a", "b"])
    for options in ({}, move):
        losses, cosines = torch.ones(2, **options), torch.eye(2, **options)
        recorded.record(optimizer.step(losses=losses, cosines=cosines))
    values = recorded.to_dict()
    assert values["losses"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert values["cosines"].device.type == "cpu"


class NoCopies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises if the host would wait for a device: when it reads a number, or prepares a copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "_to_copy", "copy_", "nonzero", "stack", "cat")):
            raise AssertionError(f"{func} may wait for a device")
        return func(*args, **(kwargs or {}))


def test_host_waits_for_the_device_once_in_many_records() -> None:
    bench, recorded = Bench((3, 4), 3, torch.float32), History()
    for step in range(1, 2 * MOVE_EVERY):
        bench.step(list(torch.randn(3, 3, 4)))
        if step % MOVE_EVERY == 0:
            recorded.record(bench.optimizer)
        else:
            with NoCopies():  # type: ignore[no-untyped-call]
                recorded.record(bench.optimizer)


def test_nothing_but_small_tensors_is_kept() -> None:
    model, optimizer = wrap()
    recorded = History()
    train(model, optimizer, 0)
    recorded.record(optimizer)
    gone: list[weakref.ref[Any]] = [
        weakref.ref(optimizer.rotations),
        weakref.ref(model),
        weakref.ref(next(model.parameters())),
    ]
    assert all(tensor.grad_fn is None for tensor in recorded._recent[0].values())
    del model, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert len(recorded) == 1


def unnamed() -> RotoGradOptimizer:
    model = TwoTasks()
    return RotoGradOptimizer(sgd(model.parameters()), heads=list(model.heads.values()))


NAMED: list[tuple[Callable[[], Measured], tuple[str, ...]]] = [
    (lambda: wrap()[1], ("left", "right")),
    (unnamed, ("heads[0]", "heads[1]")),
    (lambda: wrap(num_tasks=2)[1], ("task 0", "task 1")),
    (lambda: RotoGrad(nn.Linear(3, 4), [nn.Linear(4, 1), nn.Linear(4, 2)], 4), ("heads[0]", "heads[1]")),
]


@pytest.mark.parametrize(("make", "names"), NAMED, ids=["mapping", "sequence", "functional", "module"])
def test_names_of_tasks(make: Callable[[], Measured], names: tuple[str, ...]) -> None:
    optimizer, recorded = make(), History()
    if isinstance(optimizer, RotoGradOptimizer):
        rep = torch.randn(5, 6, requires_grad=True)
        heads = [module for parts in optimizer._core.heads for module in modules_of(parts)]
        outputs = [head(rep) for head in heads] if heads else optimizer.rotate(rep)
        optimizer.step([output.square().mean() for output in outputs], rep)
    else:
        optimizer.backward([output.square().mean() for output in optimizer(torch.randn(5, 3))])
    recorded.record(optimizer)
    assert recorded.task_names == names
    assert f"loss/{names[1]}" in scalars(optimizer)


INVALID: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no step yet": (lambda: History().record(wrap()[1]), RuntimeError, "seen a backward pass.*after optimizer.step"),
    "bare optimizer": (
        lambda: History().record(cast(Any, torch.optim.SGD([torch.zeros(1)], lr=0.1))),
        TypeError,
        "RotoGradOptimizer.*got a SGD.*Accelerate",
    ),
    "other tasks": (
        lambda: random_history(2, 1).record(FakeOptimizer(["a", "b"]).step()),
        ValueError,
        r"\['task 0', 'task 1'\].*\['a', 'b'\].*one History per optimizer",
    ),
    "no records": (lambda: History().to_dict(), RuntimeError, "must have records, got none"),
    "scalars before a step": (lambda: scalars(wrap()[1]), RuntimeError, "seen a backward pass"),
}


@pytest.mark.parametrize("case", INVALID)
def test_errors_say_what_to_do(case: str) -> None:
    call, error, message = INVALID[case]
    with pytest.raises(error, match=message):
        call()


def test_failed_record_changes_nothing() -> None:
    recorded = random_history(2, 3)
    before = recorded.to_dict()
    with pytest.raises(ValueError, match="one History"):
        recorded.record(FakeOptimizer(["a", "b"]).step())
    assert_same(recorded.to_dict(), before)
    assert len(recorded) == 3


def test_changing_the_dict_changes_no_history() -> None:
    recorded = random_history(2, MOVE_EVERY)
    recorded.to_dict()["losses"].zero_()
    assert (recorded.to_dict()["losses"] > 0).all()


def test_frame_has_a_row_for_every_step_and_columns_by_name() -> None:
    pandas = importlib.import_module("pandas")
    recorded = random_history(3, MOVE_EVERY + 2, absent=0.3, names=["a", "b", "c"])
    frame, values = recorded.to_pandas(), recorded.to_dict()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.name == "step"
    assert frame.index.tolist() == values["step"].tolist()
    per_task = {"loss": "losses", "grad_norm": "grad_norms", "weight": "weights", "alignment": "alignment"}
    per_task |= {"angle": "angles", "total_angle": "total_angles", "present": "present"}
    for prefix, field in per_task.items():
        for task, name in enumerate("abc"):
            assert_same(torch.tensor(frame.pop(f"{prefix}/{name}").to_numpy()), values[field][:, task])
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        column = frame.pop(f"cosine/{'abc'[i]}/{'abc'[j]}")
        assert_same(torch.tensor(column.to_numpy()), values["cosines"][:, i, j])
    for name in ("conflict_rate", "rotation_lr", "finite"):
        assert_same(torch.tensor(frame.pop(name).to_numpy()), values[name])
    assert frame.shape[1] == 0


def test_without_pandas_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pandas must be installed.*pip install pandas"):
        random_history(2, 1).to_pandas()
