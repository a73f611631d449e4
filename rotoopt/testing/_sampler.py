"""Random tensors from one seed: tests draw seeds, so that a failure can be replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from rotoopt._rotation.cayley import determinant_signs


class Sampler:
    """Random tensors of one dtype from one seed.

    Args:
        seed: Seed of its own generator; torch's global one does not change.
        dtype: Of the tensors. Numbers are drawn in float64 and rounded to it, so that dtypes can be compared.
    """

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers from [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def integer(self, high: int) -> int:
        """Draw an integer from [0, high)."""
        return int(torch.randint(high, (), generator=self.generator))

    def log_scales(self, n: int, low: float, high: float) -> Tensor:
        """Return n scales from 10^low to 10^high, in random order."""
        return torch.logspace(low, high, n, dtype=self.dtype)[torch.randperm(n, generator=self.generator)]

    def skew(self, *shape: int) -> Tensor:
        """Draw skew-symmetric matrices. Shape ``(..., m)`` to ``(..., m, m)``."""
        square = self.normal(*shape, shape[-1])
        return square - square.mT

    def rotations(self, num_tasks: int, m: int) -> Tensor:
        """Draw Haar rotations. Shape ``(num_tasks, m, m)``."""
        # By QR: the signs of R's diagonal fix Q, and one reflected column fixes the determinant.
        Q: Tensor
        Q, R = torch.linalg.qr(torch.randn(num_tasks, m, m, generator=self.generator, dtype=torch.float64))
        Q *= R.diagonal(dim1=-2, dim2=-1).sign()[:, None]
        Q[determinant_signs(Q) < 0, :, 0] *= -1
        return Q.to(self.dtype)

    def directions(self, num_tasks: int, *shape: int) -> tuple[Tensor, Tensor]:
        """Draw unit gradients that agree in part, as those of real tasks do; return them and their mean."""
        grads = self.normal(num_tasks, *shape) + self.normal(*shape)
        units = grads / grads.flatten(1).norm(dim=1).view(num_tasks, *[1] * len(shape))
        return units, units.mean(dim=0)

    def task_gradients(self, num_tasks: int, *shape: int, cosine: float = 0.0, rank: int | None = None) -> Tensor:
        r"""Draw unit gradients :math:`U_k` with a chosen cosine between any two of them.

        Args:
            num_tasks: K.
            *shape: Shape of the representation, with at least K entries.
            cosine: Of every pair, from -1/(K - 1) to 1.
            rank: Rank of the gradients as matrices ``(shape[0], rest)``. Default: full. With a lower one, the cosine
                holds in expectation only.

        Returns:
            Shape ``(K, *shape)``.
        """
        n = torch.Size(shape).numel()
        if rank is None:
            directions = torch.linalg.qr(torch.randn(n, num_tasks, generator=self.generator, dtype=torch.float64)).Q.mT
        else:
            left = torch.randn(num_tasks, shape[0], rank, generator=self.generator, dtype=torch.float64)
            right = torch.randn(num_tasks, rank, n // shape[0], generator=self.generator, dtype=torch.float64)
            directions = (left @ right).flatten(1)
            directions = directions / directions.norm(dim=1, keepdim=True)
        gram = torch.full((num_tasks, num_tasks), cosine, dtype=torch.float64).fill_diagonal_(1.0)
        values, vectors = torch.linalg.eigh(gram)
        mixing = vectors @ torch.diag(values.clamp(min=0.0).sqrt()) @ vectors.mT
        mixed: Tensor = mixing @ directions
        return mixed.view(num_tasks, *shape).to(self.dtype)
