"""Cayley turns, R_k <- R_k cay(S_k), for a skew S_k that is a sum over samples or a dense matrix; and their repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_TURN = 1000.0  # Frobenius norm of S, in radians
# (I - T)^-1 = (I + T)(I + T^2)(I + T^4)...: p factors leave an error of |T|^(2^p), for |T| <= 1/2 below rounding.
SERIES_FACTORS = {torch.float32: 5, torch.float64: 6}


class Skew(Protocol):
    r"""K skew matrices :math:`S_k = N_k - N_k^\top` with :math:`N_k = W_k V^\top`."""

    def half_squared_norm(self) -> Tensor:
        r"""Return :math:`\tfrac12 \lVert S_k \rVert_F^2`. Shape ``(K,)``."""

    def has_direction(self) -> Tensor:
        """Return where S_k is more than rounding; where N_k is symmetric, as that of an aligned task, it is not."""

    def in_metric(self, factor: Tensor) -> Ascent:
        """Return the way up in the metric G, of which ``factor`` is the lower Cholesky factor, shape ``(m, m)``."""

    def turn_(self, matrices: Tensor, step: Tensor) -> None:
        r"""Set :math:`R_k \leftarrow R_k\,\mathrm{cay}(\eta_k S_k)` in place.

        Args:
            matrices: R. Shape ``(K, m, m)``.
            step: :math:`\eta`, with :math:`\lVert \eta_k S_k \rVert_2 \le 1`. Shape ``(K,)``. A zero keeps every bit.
        """


@dataclass(frozen=True)
class Ascent:
    r"""The way up in a metric G: :math:`D_k = G^{-1} S_k G^{-1}`.

    Attributes:
        skew: D.
        rise: :math:`\langle S_k, D_k \rangle`. Shape ``(K,)``.
        change: :math:`\operatorname{tr}(D_k G D_k^\top)`. Shape ``(K,)``.
    """

    skew: Skew
    rise: Tensor
    change: Tensor


class SampleSkew:
    r"""S_k as a sum over n samples, :math:`S_k = W_k V^\top - V W_k^\top`: a matrix of rank 2n, never formed.

    By Sherman, Morrison and Woodbury, with :math:`X = \eta\,[W, -V]` and :math:`Y = [V, W]`,
    :math:`\mathrm{cay}(X Y^\top) - I = X (I - Y^\top X / 2)^{-1} Y^\top`: a turn costs :math:`O(n m^2)`.

    Args:
        tasks: W. Shape ``(K, m, n)``.
        target: V. Shape ``(m, n)``, shared by the tasks.
    """

    def __init__(self, tasks: Tensor, target: Tensor) -> None:
        self._W, self._V = tasks, target
        self._VV, self._WW, self._VW = target.mT @ target, tasks.mT @ tasks, target.mT @ tasks

    def half_squared_norm(self) -> Tensor:
        """From inner products of samples."""
        return (_inner(self._VV, self._WW) - _inner(self._VW, self._VW.mT)).clamp(min=0.0)

    def has_direction(self) -> Tensor:
        """From inner products of samples."""
        return _exceeds_rounding(self.half_squared_norm(), _inner(self._VV, self._WW))

    def in_metric(self, factor: Tensor) -> Ascent:
        """In O(n m^2): of rank 2n, too."""
        W, V, n = self._W, self._V, self._V.shape[-1]
        solved = torch.cholesky_solve(torch.cat([V, W.movedim(0, 1).flatten(1)], dim=1), factor)
        inverse_V, inverse_W = solved[:, :n], solved[:, n:].reshape(len(V), len(W), n).movedim(1, 0)
        # W - c V makes the same S. Where gradients are almost aligned, S is a small difference of large terms without.
        along = (_inner(inverse_W, inverse_V) / _inner(inverse_V, inverse_V)).nan_to_num(0.0)[:, None, None]
        W, inverse_W = W - along * V, inverse_W - along * inverse_V
        VV, WW, VW = V.mT @ inverse_V, W.mT @ inverse_W, V.mT @ inverse_W  # in the metric
        skew = SampleSkew(inverse_W, inverse_V)
        return Ascent(
            skew,
            rise=2 * (_inner(VV, WW) - _inner(VW, VW.mT)),
            change=_inner(VV, skew._WW) + _inner(WW, skew._VV) - 2 * _inner(VW, skew._VW.mT),
        )

    def turn_(self, matrices: Tensor, step: Tensor) -> None:
        """In O(n m^2)."""
        W, V, n = self._W, self._V, self._V.shape[-1]
        step = step[:, None, None]
        small = W.new_empty(len(W), 2 * n, 2 * n)  # Y^T X / 2
        small[:, :n, :n], small[:, :n, n:] = self._VW, -self._VV
        small[:, n:, :n], small[:, n:, n:] = self._WW, -self._VW.mT
        inverse = _inverse_near_identity(small.mul_(step / 2))
        right = inverse @ torch.cat([V.mT.expand(len(W), n, -1), W.mT], dim=1)  # (K, 2n, m)
        left = torch.cat([matrices @ W, -(matrices @ V)], dim=2).mul_(step)  # (K, m, 2n)
        matrices.baddbmm_(left, right)


class DenseSkew:
    """S_k as a matrix: for many samples, as the positions of a map are.

    Args:
        correlation: N. Shape ``(K, m, m)``.
    """

    def __init__(self, correlation: Tensor) -> None:
        self._N, self._S = correlation, correlation - correlation.mT

    def half_squared_norm(self) -> Tensor:
        """From the entries."""
        return 0.5 * _inner(self._S, self._S)

    def has_direction(self) -> Tensor:
        """From the entries."""
        return _exceeds_rounding(self.half_squared_norm(), _inner(self._N, self._N))

    def in_metric(self, factor: Tensor) -> Ascent:
        """In O(m^3)."""
        inverse = torch.cholesky_inverse(factor)  # products take a quarter of the time of solutions with K m columns
        half = inverse @ self._S
        skew = DenseSkew(0.5 * (half @ inverse))  # D / 2 is skew, but for rounding
        return Ascent(skew, rise=_inner(self._S, skew._S), change=_inner(skew._S, half))

    def turn_(self, matrices: Tensor, step: Tensor) -> None:
        """In O(m^3)."""
        matrices.add_(matrices @ cayley_delta(self._S * step[:, None, None]))


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((-2, -1))


def _exceeds_rounding(half_squared_norm: Tensor, squared_norm_of_N: Tensor) -> Tensor:
    return half_squared_norm > 4 * torch.finfo(squared_norm_of_N.dtype).eps * squared_norm_of_N


def cayley_delta(skew: Tensor) -> Tensor:
    r"""Return :math:`Z` with :math:`I + Z = (I - S/2)^{-1}(I + S/2)`, the Cayley transform of ``skew``.

    :math:`Z = (I + S^\top S/4)^{-1}(I + S/2)\,S`: the matrix to invert is symmetric, at least I and well
    conditioned, so a Cholesky factor serves. Batched LU, the textbook way, returns invalid pivots on the CPU
    build of torch 2.13 once a process has called ``torch.set_num_threads(n)`` with n > 1.

    Args:
        skew: S, skew-symmetric. Shape ``(..., m, m)``, float32 or float64.

    Returns:
        Z, in the shape and dtype of ``skew``. ``R + R @ Z`` drifts less than ``R @ (I + Z)``.

    Example:
        >>> skew = torch.tensor([[0.0, -2.0], [2.0, 0.0]])  # a turn by 2 atan(2 / 2), a right angle
        >>> torch.eye(2) + cayley_delta(skew)
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    gram = skew.mT @ skew  # = -S S
    right = skew - 0.5 * gram
    gram.mul_(0.25).diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor = torch.linalg.cholesky_ex(gram).L  # `_ex`: no device synchronization
    return torch.cholesky_solve(right, factor)


def _inverse_near_identity(small: Tensor) -> Tensor:
    """Return (I - T)^-1 by products alone, for a spectral radius of at most 1/2 (batched LU: see above)."""
    inverse, power = small.clone(), small
    inverse.diagonal(dim1=-2, dim2=-1).add_(1.0)
    negligible = torch.finfo(small.dtype).eps ** 2  # next to I; products of subnormal numbers take thirty times as long
    for _ in range(SERIES_FACTORS[small.dtype] - 1):
        power = torch.nn.functional.hardshrink(power @ power, negligible)
        inverse = torch.baddbmm(inverse, inverse, power)
    return inverse


@torch.no_grad()
def turn_(matrices: Tensor, skew: Tensor) -> None:
    r"""Set :math:`R_k \leftarrow R_k\,\mathrm{cay}(S_k)` in place, for turns of any size.

    In float64, and repaired as a whole: an optimizer of the user's may take any step. One of more than
    :data:`MAX_TURN` is shortened to it: the condition of the inversion grows with its square.

    Args:
        matrices: R. Shape ``(K, m, m)``.
        skew: S, skew-symmetric. Shape ``(K, m, m)``, radians for small entries. S_k = 0 keeps every bit.
    """
    wide, S = matrices.double(), skew.double()
    S = S * (MAX_TURN / torch.linalg.matrix_norm(S)).clamp(max=1.0)[:, None, None]
    turned = (wide + wide @ cayley_delta(S)).to(matrices.dtype)
    turns = (skew != 0).flatten(1).any(1)
    repair_columns_(turned, 0, turned.shape[-1], turns)
    matrices.copy_(torch.where(turns[:, None, None], turned, matrices))


def repair_columns_(matrices: Tensor, first: int, count: int, where: Tensor) -> None:
    r"""Take one Newton-Schulz step towards SO(m) on some columns J, in place, in O(count m^2).

    With :math:`E_J = R^\top R_J - I_J`, :math:`R \leftarrow R - \tfrac12 (R E_J P^\top + R_J E_J^\top - R_J E_{JJ}
    P^\top)`, P the columns J of I. A sweep over all columns squares the error, as one full step does.

    Args:
        matrices: R. Shape ``(K, m, m)``.
        first: The first column of J.
        count: The number of columns of J, fewer where the matrix ends.
        where: Which matrices to repair; the others keep every bit. Shape ``(K,)``, bool.
    """
    J = slice(first, first + count)
    columns = matrices[:, :, J].clone()
    error = matrices.mT @ columns  # (K, m, count)
    error[:, J].diagonal(dim1=-2, dim2=-1).sub_(1.0)
    error.mul_(where[:, None, None])
    if count < matrices.shape[-1]:  # else both terms that end in P are one
        matrices[:, :, J] -= 0.5 * (matrices @ error - columns @ error[:, J])
    matrices.baddbmm_(columns, error.mT, alpha=-0.5)


def determinant_signs(matrices: Tensor) -> Tensor:
    """Return the signs of the determinants of ``matrices``, shape ``(..., m, m)``. Shape ``(...)``.

    From the Householder reflections of a QR decomposition: see ``_haar`` for why not ``torch.linalg.slogdet``.
    """
    triangular, tau = torch.geqrf(matrices)
    num_reflections = (tau != 0).sum(-1)
    return triangular.diagonal(dim1=-2, dim2=-1).sign().prod(-1) * (1 - 2 * (num_reflections % 2))


def orthogonality_error(matrices: Tensor) -> Tensor:
    r"""Return :math:`\max_{ij} |R^\top R - I|_{ij}` of each matrix. Shape ``(..., m, m)`` to ``(...)``."""
    gram = matrices.mT @ matrices
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return gram.abs().amax(dim=(-2, -1))
