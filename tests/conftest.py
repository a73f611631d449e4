"""Settings of all tests: seeds, determinism, hypothesis profiles, --runslow and markers."""

import gc
import os

import hypothesis
import pytest
import torch
from torch import Tensor

# One thread: then sums have the same order on every machine, and small tensors gain nothing from
# more. A test that needs more threads starts another process.
torch.set_num_threads(1)
# Also fills new memory with NaN, so that reads of uninitialized memory are detected. On a GPU, cuBLAS
# would require an environment variable.
torch.use_deterministic_algorithms(not torch.cuda.is_available())


class _TorchGenerator:
    """Torch's global generator, with the interface that hypothesis expects."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> Tensor:
        return torch.get_rng_state()

    def setstate(self, state: Tensor) -> None:
        torch.set_rng_state(state)


# Without this a failing example could not be replayed. The name keeps the object alive, because hypothesis
# holds only a weak reference.
_GENERATOR = _TorchGenerator()
hypothesis.register_random(_GENERATOR)

hypothesis.settings.register_profile("dev", max_examples=10, deadline=None)
# For mutation testing: the first failure is enough, and shrinking it takes longer than all other tests.
hypothesis.settings.register_profile(
    "mutation",
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.register_profile("default", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=100, deadline=None)
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
hypothesis.settings.load_profile(_PROFILE)

# Scripts: looking for doctests in them would import them, and what they need.
collect_ignore = ["benchmarks"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {
        "slow": None if config.getoption("--runslow") else "needs --runslow",
        "cuda": None if torch.cuda.is_available() else "needs a GPU",
    }
    for item in items:
        for marker, reason in skips.items():
            if reason is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    # Half a million objects of imported modules: fold() searches all that the garbage collector tracks.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)
