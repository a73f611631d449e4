"""Heads that a rotation can be folded into, and heads that keep it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD
from torch.utils._pytree import tree_leaves

from rotoopt import RotoGradOptimizer

VECTORS, TOKENS, MAPS = (4, 6), (4, 3, 6), (4, 6, 5, 5)


class Head(nn.Module):
    """A head that is a function of its layers and z."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, z: Tensor, *others: Tensor) -> Any:
        return self.function(self, z, *others)


def tied() -> nn.Module:
    embedding, layer = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    layer.weight = embedding.weight
    vars(layer)["embedding"] = embedding  # not a submodule, since it belongs to the backbone
    return layer


def tied_later() -> nn.Module:
    head = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    head[3].weight = head[1].weight
    return head


class Quantized(Tensor):
    """A tensor subclass, as in quantization and sharding."""


def quantized(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantized))
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda _, args: (args[0].tanh(),))
    return layer


def count(self: Any, z: Tensor) -> Any:
    self.b.running_mean.add_(0.1)
    self.b.num_batches_tracked.add_(1)
    return self.a(z)


def attention() -> nn.Module:
    return nn.MultiheadAttention(6, 2, batch_first=True)


@dataclass(frozen=True)
class Case:
    """A head, created for every test, and the shape of its representation.

    Attributes:
        make: Creates the head.
        shape: Shape of the representation.
        dim: Its rotated dimensions.
        reason: Why the rotation cannot be folded; a regular expression.
        others: Number of its other inputs.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = VECTORS
    dim: int | tuple[int, ...] = -1
    reason: str = ""
    others: int = 0


FOLDABLE = {
    "linear": Case(lambda: nn.Linear(6, 2)),
    "linear on tokens": Case(lambda: nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)), TOKENS),
    "flattened tokens": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 2)), TOKENS),
    "flattened map": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(150, 2)), MAPS, 1),
    "functional view": Case(lambda: Head(lambda self, z: self.a(z.view(4, -1)), a=nn.Linear(18, 2)), TOKENS),
    "two dimensions, apart": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(150, 2)), MAPS, (1, 3)),
    "dropout": Case(lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Linear(6, 2))),
    "nested": Case(lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(6, 4)), nn.BatchNorm1d(4)))),
    "convolution": Case(lambda: nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)), MAPS, 1),
    "circular convolution": Case(lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), MAPS, -3),
    "pooled": Case(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)), MAPS, 1),
    "pooled in part": Case(lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 2)), MAPS, 1),
    "pooled by a function": Case(lambda: nn.Sequential(Head(lambda self, z: z.mean((2, 3))), nn.Linear(6, 2)), MAPS, 1),
    "upsampled": Case(lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(6, 2, 1)), MAPS, 1),
    "channels last": Case(lambda: Head(lambda self, z: self.a(z.movedim(1, -1)), a=nn.Linear(6, 2)), MAPS, 1),
    "two branches": Case(
        lambda: Head(lambda self, z: {"a": self.a(z), "b": (self.b(z), None)}, a=nn.Linear(6, 2), b=nn.Linear(6, 3))
    ),
    "twice": Case(lambda: Head(lambda self, z: self.a(z) + self.a(z).tanh(), a=nn.Linear(6, 2))),
    "transformer": Case(
        lambda: nn.Sequential(nn.Linear(6, 6), nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)), TOKENS
    ),
    "an exit that never meets z": Case(
        lambda: Head(
            lambda self, z: self.b(self.a(z)) if z.mean() < 1e3 else self.c(self.a(z)),
            a=nn.Linear(6, 5),
            b=nn.Linear(5, 2),
            c=nn.Linear(5, 2),
        )
    ),
    "a later layer in two places": Case(lambda: nn.Sequential(nn.Linear(6, 4), *[nn.Linear(4, 4)] * 2)),
    "tied later": Case(tied_later),
    "counts": Case(lambda: Head(count, a=nn.Linear(6, 2), b=nn.BatchNorm1d(2))),
    "draws numbers": Case(lambda: Head(lambda self, z: self.a(z) * torch.rand(()), a=nn.Linear(6, 2))),
}


def experts(self: Any, z: Tensor) -> Tensor:
    """Sparse experts: each sample is passed to one of four layers."""
    chosen = self.gate(z).argmax(1)
    layers = [self.a, self.b, self.c, self.d]
    outputs = [layer(z) * (chosen == k)[:, None] for k, layer in enumerate(layers) if (chosen == k).any()]
    return torch.stack(outputs).sum(0)


def early_exit(self: Any, z: Tensor) -> Any:
    first = self.a(z)
    return self.b(first) if first.mean() < 1e3 else self.c(z)


LATER, PASSED, OWNED = (
    "an activation, a skip connection or the like uses z",
    "no layer reads z directly",
    "its .* shares its weight with other modules",
)
UNFOLDABLE = {
    "activation": Case(lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 2)), reason=LATER),
    "functional activation": Case(lambda: Head(lambda self, z: self.a(z.tanh()), a=nn.Linear(6, 2)), reason=PASSED),
    "maxima": Case(lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 2, 1)), MAPS, 1, LATER),
    "the first layer in two places": Case(lambda: nn.Sequential(*[nn.Linear(6, 6)] * 2), reason=LATER),
    "layer norm": Case(lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), reason="it begins with LayerNorm"),
    "batch norm": Case(
        lambda: nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)), MAPS, 1, "it begins with BatchNorm2"
    ),
    "grouped convolution": Case(lambda: nn.Conv2d(6, 4, 3, groups=2), MAPS, 1, r"it begins with Conv2d\(.*groups=2"),
    "recurrent": Case(lambda: Head(lambda self, z: self.a(z)[0], a=nn.LSTM(6, 2)), reason="it begins with LSTM"),
    "attention": Case(lambda: Head(lambda self, z: self.a(z, z, z)[0], a=attention()), TOKENS, reason=PASSED),
    "residual": Case(lambda: Head(lambda self, z: z + self.a(z), a=nn.Linear(6, 6)), reason=LATER),
    "slight residual": Case(lambda: Head(lambda self, z: 1e-5 * z + self.a(z), a=nn.Linear(6, 6)), reason=LATER),
    "on something else, too": Case(
        lambda: Head(lambda self, z: self.a(z) + self.a(torch.ones_like(z)), a=nn.Linear(6, 2)), reason=LATER
    ),
    "one branch of two": Case(
        lambda: Head(lambda self, z: (self.a(z), self.b(z)), a=nn.Linear(6, 2), b=nn.LayerNorm(6)),
        reason="it begins with LayerNorm",
    ),
    "transposed tokens": Case(lambda: nn.Linear(6, 2), (4, 6, 6), 1, LATER),
    "positions of a map": Case(lambda: nn.Linear(5, 2), MAPS, 1, r"it begins with Linear\(in_features=5"),
    "flattened by a copy": Case(
        lambda: nn.Sequential(Head(lambda self, z: z.flatten(1).clone()), nn.Linear(150, 2)),
        MAPS,
        1,
        r"it begins with Linear\(in_features=150",
    ),
    "one-dimensional convolution": Case(
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 1)), reason=r"it begins with Conv1d\(2"
    ),
    "other inputs": Case(
        lambda: Head(lambda self, z, other: self.a(z) * other, a=nn.Linear(6, 2)),
        reason="it (needs more inputs than z|does not run on z alone)",
        others=1,
    ),
    "other dtypes": Case(
        lambda: Head(lambda self, z: self.a(z) + self.b(torch.ones(6)), a=nn.Linear(6, 2), b=nn.Linear(6, 2)),
        reason=r"it does not run on z alone in torch.float64 \(RuntimeError: .*must have the same dtype",
    ),
    "weight_norm": Case(lambda: parametrizations.weight_norm(nn.Linear(6, 2)), reason=PASSED),
    "tied": Case(tied, reason=r"its Linear\(in_features=6.* shares its weight"),
    "quantized": Case(
        lambda: nn.Sequential(nn.Linear(6, 4), quantized(nn.Linear(4, 2))),
        reason="its parameters are sharded or quantized",
    ),
    "rotated samples": Case(lambda: nn.Linear(6, 2), VECTORS, 0, r"it begins with Linear\(in_features=6"),
    "as many rotated samples as features": Case(lambda: nn.Linear(6, 2), (6, 6), 0, LATER),
    "old weight_norm": Case(lambda: old_weight_norm(nn.Linear(6, 2)), reason=rf"{OWNED}, or the weight is computed"),
    "hooked by the user": Case(lambda: hooked(nn.Linear(6, 2)), reason=PASSED),
    "experts": Case(
        lambda: Head(experts, gate=nn.Linear(6, 4), **{name: nn.Linear(6, 2) for name in "abcd"}),
        (2, 6),
        reason=r"[a-d]\.weight, which may read z, was not used",
    ),
    "early exit": Case(
        lambda: Head(early_exit, a=nn.Linear(6, 5), b=nn.Linear(5, 2), c=nn.Linear(6, 2)),
        reason=r"c\.weight, which may read z, was not used",
    ),
    "no tensors": Case(
        lambda: Head(lambda self, z: torch.distributions.Normal(self.a(z), 1.0), a=nn.Linear(6, 2)), reason=LATER
    ),
}


def run(head: nn.Module, z: Tensor, others: int = 0) -> list[Tensor]:
    torch.manual_seed(3)
    outputs = head(z, *[torch.tensor(2.0)] * others)
    outputs = outputs.mean if isinstance(outputs, torch.distributions.Normal) else outputs
    return [output for output in tree_leaves(outputs) if output is not None]


def predict(head: nn.Module, z: Tensor, others: int = 0) -> list[Tensor]:
    with torch.no_grad():
        return run(head, z, others)


def trained(case: Case, head: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Tensor]:
    """Train ``head`` for one step and set it to eval mode; return the optimizer and a representation."""
    z = nn.Parameter(torch.randn(case.shape, dtype=dtype))
    bare = SGD([z, *head.to(dtype).parameters()], lr=0.1)
    optimizer = RotoGradOptimizer(bare, [head], dim=case.dim, init="haar", **options)
    loss = torch.stack([output.square().mean() for output in run(head, z, case.others)]).sum()
    optimizer.step([loss], z)
    head.eval()
    return optimizer, z.detach()
