"""Rotations: one R_k in SO(m) per task, all of them in one ``(K, m, m)`` tensor on ``geotorch.SO``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import geotorch
import torch
from geotorch.so import uniform_init_
from torch import Tensor, nn

from rotoopt._rotation.cayley import determinant_signs
from rotoopt._torch.processes import Processes

Init = Literal["identity", "haar"]


class Rotations(nn.Module):
    """K rotations R_k in SO(m), owned by the optimizer and applied in front of the heads.

    The rotations are a buffer of a ``geotorch.SO`` manifold, not parameters: they are in no ``param_groups``,
    ``requires_grad`` is False, and they add no keys to the state dict of the model. They are float32, or float64 if
    the network is float64.

    Args:
        num_tasks: K.
        size: m. ``None``: the rotations are created by the first :meth:`create`.
        rotate: One flag per task. A task whose flag is False keeps R_k = I.
        init: ``"identity"``, or ``"haar"`` for rotations drawn uniformly from SO(m).
        seed: What to draw them from; ``None``: drawn with torch's global generator.
        device: The device of the rotations.
        dtype: ``torch.float32`` or ``torch.float64``.

    Attributes:
        size: m, or None before the rotations exist.
        seeds: What each rotation is drawn from when it is created, None for R_k = I. Known before their size is, so
            that a copy or a saved state from before the first forward pass gets the same rotations.
    """

    rests: Tensor

    def __init__(
        self,
        num_tasks: int,
        size: int | None,
        *,
        rotate: Sequence[bool],
        init: Init,
        device: torch.device,
        dtype: torch.dtype,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.covers_all = size is None  # otherwise the other features are not rotated
        self.rotate = tuple(rotate)
        # The flags on the device, so that no step copies anything to it.
        self.register_buffer("rests", ~torch.tensor(self.rotate, device=device), persistent=False)
        self.init: Init = init
        self.seeds: list[int | None] = [None] * num_tasks
        if init == "haar":
            first = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
            self.seeds = [first + task if flag else None for task, flag in enumerate(rotate)]
        self.dtype = dtype
        self.size: int | None = None  # that of the manifold, whose attributes are slow to read
        self.manifold: geotorch.SO | None = None
        if size is not None:
            self.create(size)

    @classmethod
    def like(
        cls,
        param: Tensor,
        num_tasks: int,
        size: int | None,
        *,
        rotate: Sequence[bool],
        init: Init,
        processes: Processes,
    ) -> Rotations:
        """Return rotations for the network that ``param`` belongs to, the same on all processes."""
        dtype = torch.promote_types(param.dtype, torch.float32) if param.is_floating_point() else torch.float32
        seed = processes.shared_seed() if init == "haar" else None
        return cls(num_tasks, size, rotate=rotate, init=init, seed=seed, device=param.device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """The device of the rotations, which is that of the latest representation."""
        return self.rests.device

    @property
    def matrices(self) -> Tensor:
        """The rotations. Shape ``(K, m, m)``, detached. Clone to keep them: the next step changes them."""
        if self.size is None:
            raise RuntimeError(
                "`rotations` must exist before they are read, got none. They are created in the first forward pass in "
                "training mode, which determines their size; pass `rotation_size` to create them at construction."
            )
        base: Tensor = self.manifold.base  # type: ignore[union-attr]
        return base.detach()

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, task: int) -> Tensor:
        return self.matrices[task]

    def create(self, size: int) -> None:
        """Create the K rotations of ``size`` features."""
        self._allocate(size)
        self.matrices.copy_(torch.eye(size, device=self.device))
        for task, seed in enumerate(self.seeds):
            if seed is not None:
                _draw_(self[task], seed)

    def _allocate(self, size: int) -> None:
        with torch.device("meta"):  # otherwise geotorch draws K Haar matrices: slow, and uses random numbers
            manifold = geotorch.SO((self.num_tasks, size, size), triv="cayley")
        manifold.to(self.dtype).to_empty(device=self.device)
        self.manifold, self.size = manifold, size

    def discard(self) -> None:
        """Forget the rotations: they will be created anew."""
        self.manifold = self.size = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotations:
        """Move and cast with the parent module, but not below float32."""
        before = None if self.manifold is None else self.matrices
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.manifold is not None and before is not None and self.matrices.itemsize < torch.float32.itemsize:
            self.manifold.base = before.to(self.device, torch.float32)
        return self

    def load_matrices(self, matrices: Tensor) -> None:
        """Set the rotations to ``matrices``, shape ``(K, m, m)``."""
        if self.manifold is None:
            self._allocate(matrices.shape[-1])
        self.matrices.copy_(matrices)

    def load_matrix(self, task: int, matrix: Tensor) -> None:
        """Set R_k of ``task`` to ``matrix``, shape ``(m, m)``; the others are created if they do not exist yet."""
        if self.manifold is None:
            self.create(len(matrix))
        self.matrices[task].copy_(matrix)

    def start(self, task: int, seed: int | None) -> None:
        """Set R_k of ``task`` to what ``seed`` gives, when it is created or now."""
        self.seeds[task] = seed
        if self.size is not None:
            _draw_(self[task], seed)

    def is_turned(self, task: int) -> bool:
        """Whether R_k differs from I; synchronizes with the device."""
        if not self.rotate[task] or self.size is None:
            return False
        return not torch.equal(self[task], torch.eye(self.size, device=self.device, dtype=self[task].dtype))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        matrices = state_dict.get(f"{prefix}manifold.base")
        if matrices is not None and self.manifold is None:
            self._allocate(matrices.shape[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return f"num_tasks={self.num_tasks}, size={self.size}, init={self.init!r}, rotate={self.rotate}"


@torch.no_grad()
def _draw_(matrix: Tensor, seed: int | None) -> None:
    """Set ``matrix`` to the Haar rotation of ``seed``, shape ``(m, m)``; to I for None.

    Drawn in float64, one by one: geotorch uses ``torch.det`` for the sign, which MKL computes incorrectly for a batch
    of large matrices on several threads (pytorch#142815), and which underflows to zero for a large matrix.
    """
    if seed is None:
        matrix.zero_().fill_diagonal_(1.0)
        return
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU
        drawn = uniform_init_(torch.empty(matrix.shape, dtype=torch.float64, device="cpu"))
    drawn[:, 0] *= determinant_signs(drawn[None])[0]
    matrix.copy_(drawn)
