"""The example runs as its header says, both commands give the same result, and both terminate."""

import os
import runpy
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rotoopt  # noqa: F401 # in the ranks, too, before names of torch are patched there
from tests.distributed.ranks import COUNT, Ranks

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ["examples/distributed.py", "--steps", "20"]

pytestmark = pytest.mark.distributed


def run(*arguments: str) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=null, stdout=pipe, stderr=pipe, text=True)
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes; after a kill they would keep running
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    head, _, numbers = output.strip().partition(": ")
    assert head == "losses after training"
    return [float(number) for number in numbers.split(", ")]


def test_example_under_torchrun_is_the_example_in_one_process() -> None:
    ranks = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *EXAMPLE, "--batch", "32")
    assert ranks == pytest.approx(run(*EXAMPLE, "--batch", "64"), rel=1e-4)


THREADS_LEFT = """
import runpy, sys, time
from pathlib import Path

threads = lambda: [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
deadline = time.monotonic() + 10
while (left := [name for name in threads() if "gloo" in name]) and time.monotonic() < deadline:
    time.sleep(0.05)
assert not left, left
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux only")
def test_no_thread_of_gloo_is_left_at_exit() -> None:
    """Otherwise processes may abort: a thread that frees a tensor then needs the GIL of an interpreter that has ended.

    The threads end with the group, unless something refers to it after ``destroy_process_group``.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    assert run(*launch, sys.executable, "-c", THREADS_LEFT, *EXAMPLE, "--batch", "32")


def models_left(rank: int) -> list[bool]:
    """Return, for each model that the example wraps, whether it still exists when the process group is destroyed."""
    wrapped: list[weakref.ref[nn.Module]] = []
    left: list[bool] = []

    def wrap(network: nn.Module) -> DistributedDataParallel:
        model = DistributedDataParallel(network)
        wrapped.append(weakref.ref(model))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(COUNT))
        patch.setattr(sys, "argv", EXAMPLE)
        patch.setattr(nn.parallel, "DistributedDataParallel", wrap)
        patch.setattr(dist, "init_process_group", lambda backend: None)  # the ranks still need their group
        patch.setattr(dist, "destroy_process_group", lambda: left.extend(model() is not None for model in wrapped))
        runpy.run_path(str(ROOT / EXAMPLE[0]), run_name="__main__")
    return left


def test_model_is_gone_before_its_process_group(ranks: Ranks) -> None:
    """Otherwise processes may hang at exit: the reducer of a model must not hold the last reference to a group.

    Unlike the group itself, the reducer holds the GIL while it waits for the threads of gloo. One of these may need the
    GIL to free the tensors of the last collective, if the machine is busy and the thread is late.
    """
    assert ranks.run(models_left) == [[False], [False]]
