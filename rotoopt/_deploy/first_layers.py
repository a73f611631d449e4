"""The layers of a head that consume the representation: found by running the head, and checked to be all it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from rotoopt._capture.hooks import HeadHook
from rotoopt._capture.representation import RotatedDims, rotated
from rotoopt._torch.modules import in_eval_mode, living_modules
from rotoopt._torch.private import own_parameters, tree_leaves, without_forward_pre_hooks

CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class UnfoldableError(Exception):
    """Why a rotation cannot become part of a head."""


@dataclass(frozen=True)
class FirstLayer:
    """A layer that consumes the representation.

    Attributes:
        weight: Its weight. Shape ``(out, in, ...)``.
        transposed: Whether the shape is ``(in, out, ...)`` instead.
        sample: The shape in which each row of the weight meets the representation.
        dims: Which dimensions of ``(out, *sample)`` meet the rotated ones.
    """

    weight: Tensor
    transposed: bool
    sample: tuple[int, ...]
    dims: RotatedDims

    def folded(self, weight: Tensor, matrix: Tensor) -> Tensor:
        r"""Return the weight that does to z what ``weight`` does to R z: :math:`w^\top R z = (R^\top w)^\top z`."""
        rows = weight.transpose(0, 1) if self.transposed else weight
        folded = rotated(rows.reshape(-1, *self.sample), matrix.mT, self.dims).reshape(rows.shape)
        return folded.transpose(0, 1) if self.transposed else folded


def wide(tensor: Tensor) -> Tensor:
    """Return a copy in float64, where the device has it: no TF32 there, and no rounding that could hide anything."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    return tensor.to(dtype, copy=True)


@torch.no_grad()
def find_first_layers(head: nn.Module, shape: torch.Size, dims: RotatedDims, like: Tensor) -> list[FirstLayer]:
    """Return the layers of ``head`` that consume the representation, if to rotate their weights is all it takes.

    That is tried out, with a random matrix instead of R: one close to I would hide what else the head does with z. What
    did not run then, such as other experts, may take z another time.

    Args:
        head: The head. It is left as it was, and so are all random generators.
        shape: Shape of the representation.
        dims: Its rotated dimensions.
        like: A rotation, for its size and device. Shape ``(m, m)``.

    Raises:
        UnfoldableError: If it takes more, or the head does not run on z alone.
    """
    if any(type(param) is not nn.Parameter for param in head.parameters()) or _is_sharded(head):
        raise UnfoldableError("its parameters are sharded or quantized")
    generator = torch.Generator().manual_seed(0)  # all processes of a group come to the same result
    z = wide(torch.randn(shape, generator=generator).to(like.device))
    matrix = wide(torch.randn(like.shape, generator=generator).to(like.device)) / len(like) ** 0.5
    tensors = {
        name: wide(tensor) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in (*head.named_parameters(), *head.named_buffers())
    }
    names = {id(param): name for name, param in head.named_parameters()}
    with _unrotated(head):
        rotated_z = rotated(z, matrix, dims).contiguous()  # nn.Flatten keeps storage
        with _Used() as used:
            expected, consumers = _trace(head, tensors, rotated_z)
        layers = [_first_layer(layer, fed, z, dims) for layer, fed in consumers.items()]
        if not layers:
            raise UnfoldableError("no layer takes z as it is")
        folded = {names[id(layer.weight)]: layer.folded(wide(layer.weight), matrix) for layer in layers}
        if not _agree(_run(head, {**tensors, **folded}, z), expected):
            raise UnfoldableError("its first layers are not all that z goes through")
    idle = [name for name, tensor in tensors.items() if id(tensor) not in used.ids and name in names.values()]
    idle = [name for name in idle if any(size % dims.size(z.shape) == 0 for size in tensors[name].shape)]
    if idle:
        raise UnfoldableError(
            f"{idle[0]}, which may meet z, was not used when it was tried out: its input may decide which layers run"
        )
    return layers


class _Used(TorchFunctionMode):
    """Notes the tensors that functions are called with.

    Attributes:
        ids: Their ids.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ != "__get__":  # to ask for a shape or a dtype is no use
            self.ids |= {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def _is_sharded(head: nn.Module) -> bool:
    """Whether FSDP has part of ``head``. After a forward pass, its parameters may look like any others."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    shards = (each for each in living_modules() if isinstance(each, FSDPModule | FullyShardedDataParallel))
    parts = set(head.modules())
    return any(not parts.isdisjoint(each.modules()) for each in shards)


@contextmanager
def _unrotated(head: nn.Module) -> Iterator[None]:
    """Have ``head`` in eval mode and without its rotation."""
    # A head that was compiled would not notice the hooks that are put on and taken off here.
    with without_forward_pre_hooks(head, HeadHook), in_eval_mode(head), torch.compiler.set_stance("force_eager"):
        yield


def _trace(head: nn.Module, tensors: dict[str, Tensor], rep: Tensor) -> tuple[list[Any], dict[nn.Module, Tensor]]:
    """Return the outputs, and the layers with parameters that ``rep`` reaches, with what they were fed.

    Layers without parameters are passed: views such as ``nn.Flatten``, but pooling too, which commutes with a rotation
    of the channels. What does not commute shows in the outputs.
    """
    followed = {_storage(rep): rep}  # holds what it follows, lest other tensors come to lie in the same place
    consumers: dict[nn.Module, Tensor] = {}

    def follow(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fed = next((followed[_storage(leaf)] for leaf in inputs if _storage(leaf) in followed), None)
        if fed is None:
            return
        if next(layer.parameters(), None) is not None:
            consumers[layer] = fed
        elif isinstance(output, Tensor):
            followed.setdefault(_storage(output), output)

    leaves = [module for module in head.modules() if next(module.children(), None) is None]
    handles = [leaf.register_forward_hook(follow, with_kwargs=True) for leaf in leaves]
    try:
        return _run(head, tensors, rep), consumers
    finally:
        for handle in handles:
            handle.remove()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _first_layer(layer: nn.Module, fed: Tensor, z: Tensor, dims: RotatedDims) -> FirstLayer:
    """Return how ``layer`` consumes ``fed``, which is z or was made from it."""
    d, flat = dims.size(z.shape), fed.ndim == z.ndim and 0 not in dims.resolve(z.shape)
    sample: tuple[int, ...] = (d,)
    if isinstance(layer, CONVOLUTIONS) and layer.groups == 1 and layer.in_channels == d:
        sample, dims = (d, *layer.kernel_size), RotatedDims(1)
    elif isinstance(layer, nn.Linear) and layer.in_features == d:
        dims = RotatedDims(1)
    elif isinstance(layer, nn.Linear) and flat and layer.in_features == math.prod(fed.shape[1:]):
        sample = fed.shape[1:]
    else:
        raise UnfoldableError(f"it begins with {layer}")
    if _num_owners(layer.weight) != 1:
        raise UnfoldableError(
            f"other modules have the weight of its {layer}, too, or it is computed, or gc.freeze() hides the modules"
        )
    return FirstLayer(layer.weight, getattr(layer, "transposed", False), sample, dims)


def _num_owners(weight: Tensor) -> int:
    """Return how many modules have ``weight``: tied ones, such as the embedding of a language model, are anywhere."""
    return sum(any(param is weight for param in own_parameters(module)) for module in living_modules())


def _run(head: nn.Module, tensors: dict[str, Tensor], rep: Tensor) -> list[Any]:
    """Return the outputs of ``head`` with other parameters and buffers; sampling heads sample the same every time."""
    device = rep.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return tree_leaves(functional_call(head, tensors, (rep,)))
    except Exception as error:
        raise UnfoldableError(f"it does not run on z alone in {rep.dtype} ({type(error).__name__}: {error})") from error


def _agree(outputs: list[Any], expected: list[Any]) -> bool:
    """Whether there are tensors among the outputs, and all are the same up to rounding."""
    return (
        len(outputs) == len(expected)
        and any(isinstance(output, Tensor) for output in expected)
        and all(map(_close, outputs, expected))
    )


def _close(output: Any, expected: Any) -> bool:
    if not isinstance(output, Tensor) or not isinstance(expected, Tensor):
        # `==` of a tensor and a number is a tensor, which need not be one bool.
        return not isinstance(output, Tensor) and not isinstance(expected, Tensor) and bool(output == expected)
    if output.shape != expected.shape:
        return False
    output, expected = wide(output), wide(expected)
    tolerance = torch.finfo(expected.dtype).eps ** 0.5  # far above rounding, far below what a random matrix does
    scale = float(expected[expected.isfinite()].abs().amax()) if expected.isfinite().any() else 0.0
    return torch.allclose(output, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
