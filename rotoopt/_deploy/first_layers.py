"""The layers of a head that read the representation: found by running the head, and checked by rotating them."""

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
from rotoopt._capture.inputs import leaves_of
from rotoopt._capture.representation import RotatedDims, rotated
from rotoopt._torch.modules import in_eval_mode, living_modules
from rotoopt._torch.private import own_parameters, without_forward_pre_hooks

CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class UnfoldableError(Exception):
    """Why a rotation cannot be folded into a head."""


@dataclass(frozen=True)
class FirstLayer:
    """A layer that reads the representation.

    Attributes:
        weight: Its weight. Shape ``(out, in, ...)``.
        transposed: Whether the shape is ``(in, out, ...)`` instead.
        sample: The shape of a row of the weight that corresponds to the shape of the representation.
        dims: The dimensions of ``(out, *sample)`` that correspond to the rotated ones.
    """

    weight: Tensor
    transposed: bool
    sample: tuple[int, ...]
    dims: RotatedDims

    def folded(self, weight: Tensor, matrix: Tensor) -> Tensor:
        r"""Return the weight that gives for z what ``weight`` gives for R z: :math:`w^\top R z = (R^\top w)^\top z`."""
        rows = weight.transpose(0, 1) if self.transposed else weight
        folded = rotated(rows.reshape(-1, *self.sample), matrix.mT, self.dims).reshape(rows.shape)
        return folded.transpose(0, 1) if self.transposed else folded


def wide(tensor: Tensor) -> Tensor:
    """Return a copy in float64, if the device supports it: without TF32, and with negligible rounding errors."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    return tensor.to(dtype, copy=True)


@torch.no_grad()
def find_first_layers(head: nn.Module, shape: torch.Size, dims: RotatedDims, like: Tensor) -> list[FirstLayer]:
    """Return the layers of ``head`` that read the representation, if rotating their weights equals rotating z.

    This is checked with a random matrix instead of R: with one close to I, other uses of z could remain unnoticed.
    Layers that did not run in the check, such as other experts, may use z for other inputs.

    Args:
        head: The head. It is restored afterwards, as are all random generators.
        shape: Shape of the representation.
        dims: Its rotated dimensions.
        like: A rotation, for its size and device. Shape ``(m, m)``.

    Raises:
        UnfoldableError: If it is not equivalent, or the head does not run on z alone.
    """
    if any(type(param) is not nn.Parameter for param in head.parameters()) or _is_sharded(head):
        raise UnfoldableError("its parameters are sharded or quantized")
    shape = torch.Size(max(size, 1) for size in shape)  # the latest batch of a task may be empty
    generator = torch.Generator().manual_seed(0)  # the same result in all processes of a group
    z = wide(torch.randn(shape, generator=generator, device="cpu").to(like.device))
    matrix = wide(torch.randn(like.shape, generator=generator, device="cpu").to(like.device)) / len(like) ** 0.5
    named = _named_tensors(head)
    tensors = {name: wide(each) if each.is_floating_point() else each.clone() for name, each in named.items()}
    names = {id(each): name for name, each in named.items() if isinstance(each, nn.Parameter)}
    with _unrotated(head):
        rotated_z = rotated(z, matrix, dims).contiguous()  # nn.Flatten keeps storage
        with _Used() as used:
            expected, consumers = _trace(head, tensors, rotated_z)
        layers = [_first_layer(layer, fed, z, dims) for layer, fed in consumers.items()]
        if not layers:
            raise UnfoldableError("no layer reads z directly")
        folded = {names[id(layer.weight)]: layer.folded(wide(layer.weight), matrix) for layer in layers}
        if not _agree(_run(head, {**tensors, **folded}, z), expected):
            raise UnfoldableError(
                "an activation, a skip connection or the like uses z before or beside its first layers"
            )
    idle = [name for name, tensor in tensors.items() if id(tensor) not in used.ids and name in names.values()]
    idle = [name for name in idle if any(size % dims.size(z.shape) == 0 for size in tensors[name].shape)]
    if idle:
        raise UnfoldableError(
            f"{idle[0]}, which may read z, was not used in a test run: the input may decide which layers run"
        )
    return layers


class _Used(TorchFunctionMode):
    """Records the tensors that functions are called with.

    Attributes:
        ids: Their ids.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ != "__get__":  # reading a shape or a dtype does not count
            self.ids |= {id(leaf) for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def _named_tensors(head: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of every module in ``head``, also of one that is in several places, once."""
    return {
        f"{path}.{name}".removeprefix("."): tensor
        for path, module in head.named_modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }


def _is_sharded(head: nn.Module) -> bool:
    """Whether ``head`` is sharded by FSDP. After a forward pass, its parameters may look like ordinary ones."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    shards = (each for each in living_modules() if isinstance(each, FSDPModule | FullyShardedDataParallel))
    parts = set(head.modules())
    return any(not parts.isdisjoint(each.modules()) for each in shards)


@contextmanager
def _unrotated(head: nn.Module) -> Iterator[None]:
    """Put ``head`` in eval mode, without its rotation, temporarily."""
    # Compiled code would ignore hooks that are added and removed here.
    with without_forward_pre_hooks(head, HeadHook), in_eval_mode(head), torch.compiler.set_stance("force_eager"):
        yield


def _trace(head: nn.Module, tensors: dict[str, Tensor], rep: Tensor) -> tuple[list[Any], dict[nn.Module, Tensor]]:
    """Return the outputs, and the layers with parameters that ``rep`` reaches, with their inputs.

    Layers without parameters are passed through: views such as ``nn.Flatten``, but also pooling, which commutes with a
    rotation of the channels. If something does not commute, the outputs differ.
    """
    followed = {_storage(rep): rep}  # keeps the tensors alive, so that no other tensor gets their storage
    consumers: dict[nn.Module, Tensor] = {}

    def follow(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        inputs = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
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
    """Return how ``layer`` reads ``fed``, which is z or was computed from it."""
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
            f"its {layer} shares its weight with other modules, or the weight is computed, or gc.freeze() hides "
            "modules, or torch.jit.trace has made a copy that shares it (delete that before fold())"
        )
    return FirstLayer(layer.weight, getattr(layer, "transposed", False), sample, dims)


def _num_owners(weight: Tensor) -> int:
    """Return the number of modules with ``weight``: several for tied weights, as in language models."""
    return sum(any(param is weight for param in own_parameters(module)) for module in living_modules())


def _run(head: nn.Module, tensors: dict[str, Tensor], rep: Tensor) -> list[Any]:
    """Return the outputs of ``head`` with other parameters and buffers, and the same random numbers every time."""
    device = rep.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # With tie_weights=True, torch would leave a copy behind in a module that is in several places.
            return leaves_of(functional_call(head, tensors, (rep,), tie_weights=False))
    except Exception as error:
        raise UnfoldableError(f"it does not run on z alone in {rep.dtype} ({type(error).__name__}: {error})") from error


def _agree(outputs: list[Any], expected: list[Any]) -> bool:
    """Whether the outputs contain tensors, and all are equal up to rounding errors."""
    return (
        len(outputs) == len(expected)
        and any(isinstance(output, Tensor) for output in expected)
        and all(map(_close, outputs, expected))
    )


def _close(output: Any, expected: Any) -> bool:
    if not isinstance(output, Tensor) or not isinstance(expected, Tensor):
        # `==` of a tensor and a number is a tensor, not a bool.
        return not isinstance(output, Tensor) and not isinstance(expected, Tensor) and bool(output == expected)
    if output.shape != expected.shape:
        return False
    output, expected = wide(output), wide(expected)
    # Far above rounding errors, far below the effect of a random matrix.
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    scale = float(expected[expected.isfinite()].abs().amax()) if expected.isfinite().any() else 0.0
    return torch.allclose(output, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
