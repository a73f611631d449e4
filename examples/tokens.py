"""A small transformer with a token-level and a sequence-level head: rotations of the features of tokens, `dim=-1`.

Sequences of symbols with brackets. One head predicts the nesting depth at each token, the other whether the whole
sequence is balanced. The token-level loss is a sum over tokens, as in language models, so it is the larger one.

    python examples/tokens.py

Takes less than a minute on two CPU cores, and prints the accuracies on a test set. RotoGrad improves the sequence-level
task at the expense of the token-level task, which converges more slowly. Output: docs/examples.md.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotoopt import RotoGradOptimizer

OPEN, CLOSE, LETTER = 0, 1, 2
LENGTH, FEATURES, DEPTHS = 16, 32, 6


class Encoder(nn.Module):
    """Two transformer layers on embedded symbols: (B, T) to (B, T, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(3, FEATURES)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, FEATURES))
        layer = nn.TransformerEncoderLayer(FEATURES, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return the token-level representation."""
        encoded: Tensor = self.layers(self.symbols(symbols) + self.positions)
        return encoded


class SequenceHead(nn.Module):
    """Pools the tokens inside the head, so that both heads read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return one logit per sequence."""
        logits: Tensor = self.layers(tokens.mean(dim=1)).squeeze(1)
        return logits


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw symbols (N, T), the depth after each token (N, T), and whether sequences are balanced (N,)."""
    symbols = torch.randint(3, (count, LENGTH), generator=generator)
    for row in symbols[: count // 2]:  # balance half of them: every bracket has its counterpart
        depth = 0
        for position in range(LENGTH):
            left = LENGTH - position
            if row[position] == OPEN and depth < left - 1:
                depth += 1
            elif depth > 0 and (row[position] == CLOSE or depth >= left):
                row[position] = CLOSE
                depth -= 1
            else:
                row[position] = LETTER
    depths = ((symbols == OPEN).long() - (symbols == CLOSE).long()).cumsum(1)
    balanced = (depths >= 0).all(1) & (depths[:, -1] == 0)
    return symbols, depths.clamp(0, DEPTHS - 1), balanced.float()


def train(epochs: int, *, rotograd: bool) -> tuple[float, float]:
    """Train, and return the test accuracies of both tasks in percent."""
    generator = torch.Generator().manual_seed(0)
    training, (symbols, depth, balanced) = draw(2048, generator), draw(1024, generator)
    torch.manual_seed(0)
    encoder, token_head, sequence_head = Encoder(), nn.Linear(FEATURES, DEPTHS), SequenceHead()
    model = nn.ModuleList([encoder, token_head, sequence_head])
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if rotograd:
        optimizer = RotoGradOptimizer(optimizer, heads={"depth": token_head, "balanced": sequence_head})
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(training[0]), generator=generator), 64):
            x, y_depth, y_balanced = (tensor[rows] for tensor in training)
            z = encoder(x)
            losses = {
                "depth": F.cross_entropy(token_head(z).mT, y_depth, reduction="sum") / len(x),
                "balanced": F.binary_cross_entropy_with_logits(sequence_head(z), y_balanced),
            }
            optimizer.zero_grad()
            if isinstance(optimizer, RotoGradOptimizer):
                optimizer.step(losses, z)
            else:
                torch.autograd.backward(list(losses.values()))
                optimizer.step()
    model.eval()
    with torch.no_grad():
        z = encoder(symbols)
        tokens = (token_head(z).argmax(-1) == depth).float().mean()
        sequences = ((sequence_head(z) > 0) == (balanced > 0)).float().mean()
    return 100 * float(tokens), 100 * float(sequences)


def main() -> None:
    """Train with the plain sum and with RotoGrad, and print the test accuracies."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    print("                 depth of tokens, %    balanced, %")
    for name, rotograd in (("plain sum", False), ("RotoGrad", True)):
        tokens, sequences = train(args.epochs, rotograd=rotograd)
        print(f"{name:<16}{tokens:19.1f} {sequences:14.1f}", flush=True)


if __name__ == "__main__":
    main()
