"""The rotations follow the learning-rate schedule of the network."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adafactor, Optimizer

from rotoopt._rotation.schedule import Schedule


def network(*rates: float) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates])


@given(rates=st.lists(st.floats(0, 10), min_size=1, max_size=8), at=st.integers(0, 7))
def test_share_is_that_of_the_highest_rate_so_far_and_is_resumed(rates: list[float], at: int) -> None:
    optimizer, highest = network(1.0, 0.0), 0.0
    schedule = Schedule(optimizer)
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        if step == at:
            saved, schedule = schedule.state_dict(), Schedule(optimizer)
            schedule.load_state_dict(saved)
        highest = max(highest, lr)
        assert schedule.share() == (lr / highest if highest > 0 else 0.0)


def test_largest_rate_of_all_groups_counts() -> None:
    optimizer = network(0.1, 0.4)
    schedule = Schedule(optimizer)
    assert schedule.share() == 1.0
    optimizer.param_groups[1]["lr"] = 0.05
    assert schedule.share() == pytest.approx(0.25)


def test_rate_may_be_a_tensor() -> None:
    optimizer = network(0.5)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    schedule = Schedule(optimizer)
    assert schedule.share() == 1.0
    optimizer.param_groups[0]["lr"].mul_(0.5)
    assert schedule.share() == 0.5


class WithoutRate(Optimizer):
    def __init__(self) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], {})


@pytest.mark.parametrize("optimizer", [WithoutRate(), Adafactor([nn.Parameter(torch.zeros(1))])], ids=["none", "own"])
def test_an_optimizer_without_a_schedule_is_at_its_start(optimizer: Optimizer) -> None:
    assert Schedule(optimizer).share() == 1.0
