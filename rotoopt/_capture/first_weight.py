"""Heads that begin with a linear layer or a convolution: R_k is applied to its weight instead of z, if that is cheaper.

Such a layer computes W (R z) = (W R) z. With C rows in W and n samples, W R takes C d^2 multiplications, and R z n d^2.
The head gets an empty batch, and a hook behind its first layer returns what this computes for z with the weight W R.
Nothing but the layer must see that batch: z is rotated if there are other hooks, or if the head is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor, nn
from torch.nn import functional as F

from rotoopt._capture.representation import RotatedDims, rotated
from rotoopt._torch.modules import ForwardHook
from rotoopt._torch.private import is_observed, not_compiled

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
LAST, CHANNELS = RotatedDims(-1), RotatedDims(1)
LEAST = 2**22  # multiplications in R z, below which the hooks cost more


class FirstWeight(ForwardHook):
    """The forward hook of the first layer of a head, which applies R to its weight.

    Args:
        path: The head, and the first modules in it down to the layer.
        layer: The layer.
        own: Hooks of ours, which may see the empty batch.
    """

    def __init__(
        self, path: tuple[nn.Module, ...], layer: nn.Linear | Convolution, own: Sequence[Callable[..., Any]]
    ) -> None:
        self.layer = layer
        self._path = path
        self._own: tuple[Callable[..., Any], ...] = (*own, self)

    @classmethod
    def of(cls, head: nn.Module, own: Sequence[Callable[..., Any]]) -> FirstWeight | None:
        """Return that of ``head``, None if it does not begin with a linear layer or a convolution."""
        *_, layer = path = _first_modules(head)
        return cls(path, layer, own) if _is_plain(layer) else None

    def can_rotate(self, rep: Tensor, matrix: Tensor, dims: RotatedDims) -> bool:
        """Whether R is applied to the weight instead of ``rep``, which enters the head."""
        layer, m = self.layer, matrix.shape[-1]
        weight = layer.weight
        if rep.numel() * m < LEAST or 2 * weight.numel() > rep.numel() or weight.shape[1] != m:
            return False
        if isinstance(layer, nn.Linear):
            fits = dims.resolve(rep.shape) == (rep.ndim - 1,)
        else:
            fits = dims.resolve(rep.shape) == (1,) and rep.ndim == weight.ndim and layer.padding_mode == "zeros"
        is_plain = _is_plain(layer) and type(rep) is Tensor and not rep.__dict__ and type(weight) is nn.Parameter
        return (
            fits and is_plain and self._path == _first_modules(self._path[0]) and not is_observed(self._path, self._own)
        )

    def defer(self, rep: Tensor, matrix: Tensor) -> Tensor:
        """Return the empty batch that enters the head, with what its first layer computes instead."""
        batch = rep[:0]
        batch.deferred = (rep, matrix)  # type: ignore[attr-defined]
        return batch

    def __call__(self, layer: nn.Linear | Convolution, args: tuple[Any, ...], output: Any) -> Any:
        """Return the output of the layer for R z."""
        deferred = getattr(args[0], "deferred", None) if args and isinstance(args[0], Tensor) else None
        return output if deferred is None else _output(layer, *deferred)


@not_compiled
def _output(layer: nn.Linear | Convolution, rep: Tensor, matrix: Tensor) -> Tensor:
    """Return the output of ``layer`` for R z."""
    if isinstance(layer, nn.Linear):
        return F.linear(rep, rotated(layer.weight, matrix.mT, LAST), layer.bias)
    weight = rotated(layer.weight, matrix.mT, CHANNELS)
    convolution = CONVOLUTIONS[type(layer)]
    return convolution(rep, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear | Convolution]:
    """Whether ``layer`` is of a known class; a subclass, which may be assigned later, may use its weight otherwise."""
    return type(layer) is nn.Linear or type(layer) in CONVOLUTIONS


def _first_modules(head: nn.Module) -> tuple[nn.Module, ...]:
    """Return ``head`` and, as long as they are ``nn.Sequential``, the first module of each."""
    path = [head]
    while type(path[-1]) is nn.Sequential and len(path[-1]):
        path.append(next(iter(path[-1])))
    return tuple(path)
