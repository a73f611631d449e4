"""What frameworks do is to hold in steps that turn the rotations, so every step is one."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def turn_in_every_step(every_step: None) -> None:
    pass
