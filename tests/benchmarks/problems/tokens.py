"""Tokens: the problem of ``examples/tokens.py``, a transformer with a token-level and a sequence-level head."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.problems.base import Metric, Outputs, Problem, Trial

sys.path.append(str(Path(__file__).parents[3] / "examples"))  # examples are scripts, not a package

from tokens import DEPTHS, FEATURES, Encoder, SequenceHead, draw

NUM_TRAINING, NUM_TEST, BATCH = 2048, 1024, 64
NUM_EPOCHS = 15


class TokenTrial(Trial):
    """The network and the data of the example."""

    d = FEATURES
    num_steps = NUM_EPOCHS * (NUM_TRAINING // BATCH)
    lr = 1e-3

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.train, self.held_out = draw(NUM_TRAINING, self.generator), draw(NUM_TEST, self.generator)
        torch.manual_seed(seed)
        self.backbone = Encoder()
        self.heads = nn.ModuleList([nn.Linear(FEATURES, DEPTHS), SequenceHead()])

    def batches(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Iterate over the sequences several times."""
        for _ in range(NUM_EPOCHS):
            for rows in torch.split(torch.randperm(NUM_TRAINING, generator=self.generator), BATCH):
                symbols, depth, balanced = (tensor[rows] for tensor in self.train)
                yield symbols, (depth, balanced)

    def losses(self, outputs: list[Tensor], targets: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Return the losses of the example: a sum over the tokens, and one value per sequence."""
        tokens, sequences = outputs
        depth, balanced = targets
        return [
            F.cross_entropy(tokens.mT, depth, reduction="sum") / len(depth),
            F.binary_cross_entropy_with_logits(sequences, balanced),
        ]

    @torch.no_grad()
    def test(self, outputs: Outputs) -> list[float]:
        """Return both accuracies, in percent."""
        symbols, depth, balanced = self.held_out
        tokens, sequences = outputs(symbols)
        right = [tokens.argmax(-1) == depth, (sequences > 0) == (balanced > 0)]
        return [100 * each.float().mean().item() for each in right]


TOKENS = Problem(
    "tokens",
    (Metric("depth of tokens, %", True), Metric("balanced, %", True)),
    TokenTrial,
    middle_lr=2.0,
)
