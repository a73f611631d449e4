"""Loggers get the measurements of the latest step."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import torch
from torch.testing import assert_close

from rotoopt.diagnostics import History, log_step, scalars
from rotoopt.diagnostics._measurements import columns
from tests.contract.models import train, wrap
from tests.diagnostics.fakes import FakeOptimizer
from tests.samplers import Bench


class FakeWriter:
    def __init__(self) -> None:
        self.written: dict[str, tuple[float, int | None]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        assert tag not in self.written
        self.written[tag] = (scalar_value, global_step)


def test_scalars_are_the_columns_of_a_history_and_leave_out_what_is_unknown() -> None:
    bench, recorded = Bench((3, 4), 3, torch.float32), History()
    bench.step([torch.ones(3, 4), None, torch.randn(3, 4)])
    recorded.record(bench.optimizer)
    logged = scalars(bench.optimizer)
    assert all(type(value) is float for value in logged.values())
    for name, column in columns(recorded.to_dict(), recorded.task_names).items():
        if math.isnan(column.item()):
            assert name not in logged
        else:
            assert logged.pop(name) == column.item()
    assert not logged


def test_absent_task_and_non_finite_step_log_no_gradients() -> None:
    absent = scalars(FakeOptimizer(["a", "b"]).step(present=torch.tensor([True, False])))
    assert {name for name in absent if name.endswith("/b")} == {"present/b", "angle/b", "total_angle/b", "loss/b"}
    infinite = scalars(FakeOptimizer(["a", "b"]).step(finite=torch.tensor(False)))
    assert infinite["finite"] == 0.0
    assert not {"conflict_rate", "alignment/a", "alignment/b"} & infinite.keys()


def test_every_number_is_written_once_with_its_step() -> None:
    model, optimizer = wrap()
    train(model, optimizer, 0, 1, 2)
    for given, expected in [(None, 2), (70, 70)]:
        writer = FakeWriter()
        log_step(writer, optimizer, given)
        assert writer.written == {tag: (number, expected) for tag, number in scalars(optimizer).items()}


def test_tensorboard_can_read_the_file(tmp_path: Path) -> None:
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer = wrap()
    expected = []
    with SummaryWriter(str(tmp_path)) as writer:
        for batch in range(3):
            train(model, optimizer, batch)
            log_step(writer, optimizer)
            expected.append(scalars(optimizer))
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == expected[0].keys()
    for tag in expected[0]:
        read = events.Scalars(tag)
        assert [event.step for event in read] == [0, 1, 2]
        assert_close([event.value for event in read], [numbers[tag] for numbers in expected])
