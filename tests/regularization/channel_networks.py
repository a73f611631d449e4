"""A network with two layers of channels, and batches for it."""

import torch
from torch import Tensor, nn

LAYERS = ["first", "second"]
Batch = tuple[Tensor, Tensor]


class Network(nn.Module):
    """Two convolutions with normalization, dropout and a skip connection around the second one, and a head."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 5, 3, padding=1)
        self.dropout: nn.Module = nn.Dropout()
        self.head = nn.Linear(5, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        around = h.clone()
        if self.inplace:
            around += self.second(h)
        else:
            around = around + self.dropout(self.second(h))
        result: Tensor = self.head(around.relu().mean(dim=(2, 3)))
        return result


def network(seed: int = 0, *, inplace: bool = False) -> Network:
    torch.manual_seed(seed)
    model = Network(inplace=inplace).double()
    model(torch.randn(16, 2, 6, 6, dtype=torch.float64))  # statistics for the normalization
    return model


def draw_batches(num: int = 2) -> list[Batch]:
    return [(torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(num)]


def fail(output: Tensor, target: Tensor) -> Tensor:
    raise KeyboardInterrupt
