"""The example runs as its header says, and both ways end alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ["examples/distributed.py", "--steps", "20"]


def run(*arguments: str) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    head, _, numbers = finished.stdout.strip().partition(": ")
    assert head == "losses after training"
    return [float(number) for number in numbers.split(", ")]


@pytest.mark.distributed
def test_example_under_torchrun_is_the_example_in_one_process() -> None:
    ranks = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *EXAMPLE, "--batch", "32")
    assert ranks == pytest.approx(run(*EXAMPLE, "--batch", "64"), rel=1e-4)
