"""The regularizers in plain float64, one number at a time, from their formulas. Never imports the package."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

Maps = Mapping[str, Tensor]


def half_squared_norm(tensors: Iterable[Tensor]) -> float:
    """1/2 ||w||^2 over all numbers."""
    return 0.5 * math.fsum(abs(number) ** 2 for tensor in tensors for number in tensor.flatten().tolist())


def behavioral(source: Maps, target: Maps) -> float:
    """1/2 sum over layers, samples, channels and positions of the squared difference."""
    return half_squared_norm(target[name].double() - source[name].double() for name in source)


def attention_behavioral(source: Maps, target: Maps, attention: Maps, channel_dim: int) -> float:
    """1/2 sum over layers, samples b and channels c of C / P a_c ||t_bc - s_bc||^2, with P positions."""
    total = []
    for name, weights in attention.items():
        s, t = (maps[name].double().movedim(channel_dim, 1) for maps in (source, target))
        for b, c in itertools.product(range(s.shape[0]), range(s.shape[1])):
            num_positions = s[b, c].numel()
            distance = half_squared_norm([t[b, c] - s[b, c]])
            total.append(len(weights) / num_positions * float(weights[c]) * distance)
    return math.fsum(total)


def bss(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum of the k smallest sigma^2, and its gradient, the sum of 2 sigma u v'."""
    U, S, Vh = torch.linalg.svd(features.double(), full_matrices=False)
    return S[-k:].square().sum(), 2 * (U[:, -k:] * S[-k:]) @ Vh[-k:]


def attention_by_ablation(
    model: nn.Module, layer: str, loss_fn: Callable[[Tensor, Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """Channel attention of a linear or convolutional layer: one forward pass per channel, with its weights zeroed."""
    rises: list[list[float]] = []
    for x, y in batches:
        whole = loss_fn(model(x), y).item()
        rises.append([])
        for channel in range(model.get_submodule(layer).get_parameter("weight").shape[0]):
            damaged = copy.deepcopy(model)
            with torch.no_grad():
                for param in damaged.get_submodule(layer).parameters():
                    param[channel] = 0.0
            rises[-1].append(loss_fn(damaged(x), y).item() - whole)
    mean = torch.tensor(rises, dtype=torch.float64).mean(dim=0)
    return torch.softmax((mean - mean.mean()) / mean.std(unbiased=False) / 5, dim=0)
