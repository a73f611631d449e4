"""The section on the Hugging Face Trainer of docs/how_to/frameworks.md: it trains like a plain loop, and resumes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from rotoopt import RotoGradOptimizer
from tests.contract.models import assert_same
from tests.test_docs import ROOT, blocks_of

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

Batch = Mapping[str, Tensor]


def section() -> tuple[str, str, str]:
    """Return the code that defines the network, that of the trainer, and that of the one that passes the losses."""
    page = (ROOT / "docs/how_to/frameworks.md").read_text(encoding="utf-8")
    network = next(blocks_of(page)).text
    trainer, _, sees_losses = (block.text for block in blocks_of(page.partition("## Hugging Face Trainer")[2]))
    return network, trainer, sees_losses


class Run:
    """The trainer of the page, before its training, and the batches that it gets."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, sees_losses: bool = False) -> None:
        monkeypatch.chdir(folder)
        torch.manual_seed(0)
        network, trainer, with_losses = section()
        self.names: dict[str, Any] = {"__name__": "__main__"}
        exec(network, self.names)
        losses_of, self.batches = self.names["losses_of"], list[Batch]()

        def recorded(outputs: Batch, batch: Batch) -> dict[str, Tensor]:
            self.batches.append(batch)
            losses: dict[str, Tensor] = losses_of(outputs, batch)
            return losses

        self.names["losses_of"] = recorded
        exec(trainer.removesuffix("trainer.train()\n"), self.names)
        self.network, self.trainer, self.losses_of = self.names["network"], self.names["trainer"], losses_of
        if sees_losses:
            exec(with_losses, self.names)
            self.trainer.__class__ = self.names["SeesLosses"]
        self.start = copy.deepcopy(self.network)

    def plain(self, *, sees_losses: bool = False) -> dict[str, Tensor]:
        """Return the weights after an ordinary loop over the same batches."""
        network = copy.deepcopy(self.start)
        optimizer = RotoGradOptimizer(AdamW(network.parameters(), lr=1e-3), heads=network.heads)
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=12)
        for batch in self.batches:
            losses = self.losses_of(network(batch["x"]), batch)
            optimizer.zero_grad()
            optimizer.backward(losses) if sees_losses else sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), self.trainer.args.max_grad_norm)
            optimizer.step()
            scheduler.step()
        weights: dict[str, Tensor] = network.state_dict()
        return weights


@pytest.mark.parametrize("sees_losses", [False, True])
def test_trains_like_a_plain_loop(sees_losses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, sees_losses=sees_losses)
    run.trainer.train()
    assert len(run.batches) == 12
    assert_same(run.network.state_dict(), run.plain(sees_losses=sees_losses))


def test_resumes_bit_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, resumed = Run(tmp_path, monkeypatch), Run(tmp_path, monkeypatch)
    whole.trainer.train()
    resumed.trainer.train(resume_from_checkpoint="output/checkpoint-6")
    assert len(resumed.batches) == 6
    assert_same(resumed.network.state_dict(), whole.network.state_dict())
    rotations = [run.names["optimizer"].rotations.matrices for run in (whole, resumed)]
    assert_same(*rotations)
