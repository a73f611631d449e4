"""The official rotograd 0.1.6.0 on the same network, in a separate process.

It needs geotorch 0.3, rotoopt needs 0.4: so it has a separate virtual environment, which is created on first use.
:class:`OfficialRotograd` is used by the benchmark; run as a script, this file is the other process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

VENV = Path(__file__).resolve().parents[2] / ".venv-official"
PYTHON = VENV / ("Scripts" if sys.platform == "win32" else "bin") / "python"
REQUIREMENTS = (
    *("torch==2.13.0", "geotorch==0.3.0", "rotograd==0.1.6.0", "numpy"),  # torch warns without numpy
    *("scikit-learn", "matplotlib", "rich"),  # the digit-pair example
)


def make_environment() -> None:
    """Create the virtual environment if it does not exist.

    Raises:
        subprocess.CalledProcessError: If the installation fails; ``stderr`` is the output of pip.
    """
    stamp = VENV / ".installed"
    if not stamp.exists():
        venv.create(VENV, symlinks=os.name != "nt", with_pip=True)
        subprocess.run(
            [PYTHON, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True, capture_output=True, text=True
        )
        stamp.touch()


class OfficialRotograd:
    """A process that trains a network with the official package, a number of steps at a time.

    Args:
        backbone: The backbone.
        heads: The heads, one per task.
        batch: Input of the backbone.
        targets: What the heads should return; the loss is the mean squared error.
        d: Features of the representation, a vector.
        threads: Number of threads of torch.
        cpu_time: Whether to measure CPU time instead of wall time.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: list[nn.Module],
        batch: Tensor,
        targets: list[Tensor],
        *,
        d: int,
        threads: int,
        cpu_time: bool,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "training.pt"
        torch.save((backbone, heads, batch, targets), path)
        command = [str(PYTHON), __file__, str(path), f"--d={d}", f"--threads={threads}", *["--cpu-time"] * cpu_time]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds_per_step(self, steps: int) -> float:
        """Run ``steps`` steps; the process sleeps before and after."""
        process = self._process
        assert process.stdin is not None  # both are pipes
        assert process.stdout is not None
        print(steps, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The process with the official rotograd ended, code {process.wait()}; see above.")
        return float(answer)

    def __enter__(self) -> OfficialRotograd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its input, and it ends
        self._folder.cleanup()


class OfficialTraining:
    """The training in the other process: the recipe of the README of the package."""

    def __init__(
        self, backbone: nn.Module, heads: list[nn.Module], batch: Tensor, targets: list[Tensor], d: int
    ) -> None:
        import rotograd  # type: ignore[import-not-found] # only in its own environment

        self.cached = rotograd.cached
        self.batch = batch
        self.targets = targets
        modules = [backbone, *heads]
        self.model: Any = rotograd.RotoGrad(backbone, heads, d).to(batch.device)
        groups: list[dict[str, Any]] = [{"params": module.parameters()} for module in modules]
        # The matrix exponentials cost more for coordinates farther from zero, up to 4 times on the stress
        # case. With this low rate for the rotations they stay near zero: the package is measured at its fastest.
        self.optimizer = torch.optim.Adam([*groups, {"params": self.model.parameters(), "lr": 1e-5}], lr=1e-4)

    def step(self) -> None:
        """Make one training step."""
        self.model.train()
        self.optimizer.zero_grad()
        with self.cached():
            outputs = self.model(self.batch)
            pairs = zip(outputs, self.targets, strict=True)
            self.model.backward([nn.functional.mse_loss(output, target) for output, target in pairs])
        self.optimizer.step()

    def seconds_per_step(self, steps: int, clock: Callable[[], float]) -> float:
        """Return the mean time of ``steps`` steps."""
        self._synchronize()
        start = clock()
        for _ in range(steps):
            self.step()
        self._synchronize()
        return (clock() - start) / steps

    def _synchronize(self) -> None:
        if self.batch.is_cuda:
            torch.cuda.synchronize()


def main() -> None:
    """For every number of steps on standard input, print the seconds per step."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("training", type=Path)
    parser.add_argument("--d", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone, heads, batch, targets = torch.load(args.training, weights_only=False)
    training = OfficialTraining(backbone, heads, batch, targets, args.d)
    for line in sys.stdin:
        print(
            training.seconds_per_step(int(line), time.process_time if args.cpu_time else time.perf_counter), flush=True
        )


if __name__ == "__main__":
    main()
