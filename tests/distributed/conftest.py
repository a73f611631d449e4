"""One pair of processes for all distributed tests."""

from collections.abc import Iterator

import pytest

from rotoopt import rotation_step
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks") / "rendezvous")
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what the functions that run on the ranks change, where they run in this process, too."""
    monkeypatch.setattr(rotation_step, "TURN_EVERY", rotation_step.TURN_EVERY)
