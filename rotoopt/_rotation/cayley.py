"""Cayley updates R_k <- R_k cay(S_k), for a skew S_k that is dense or a sum over samples, and their correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_TURN = 1000.0  # Frobenius norm of S, in radians
NEWTON_STEPS = {torch.float32: 4, torch.float64: 5}  # an error of norm 0.56^2 is squared in each, down to rounding
CLEAR = 8.0  # times eps: the share of |N|^2 that |S|^2 must exceed to be more than rounding


class Skew(Protocol):
    r"""K skew matrices :math:`S_k = N_k - N_k^\top` with :math:`N_k = W_k V^\top`."""

    def half_squared_norm(self) -> Tensor:
        r"""Return :math:`\tfrac12 \lVert S_k \rVert_F^2`. Shape ``(K,)``."""

    def in_metric(self, metric: Tensor) -> Ascent:
        """Return the ascent direction in ``metric``, G, positive definite. Shape ``(m, m)``."""

    def turn_(self, matrices: Tensor, step: Tensor) -> None:
        r"""Set :math:`R_k \leftarrow R_k\,\mathrm{cay}(\eta_k S_k)` in place.

        Args:
            matrices: R. Shape ``(K, m, m)``.
            step: :math:`\eta`, with :math:`\lVert \eta_k S_k \rVert_2 \le 1`. Shape ``(K,)``. Zero changes no bit.
        """


@dataclass(frozen=True)
class Ascent:
    r"""The ascent direction in a metric G: :math:`D_k = G^{-1} S_k G^{-1}`.

    Attributes:
        skew: D.
        rise: :math:`\langle S_k, D_k \rangle`. Shape ``(K,)``.
        change: :math:`\operatorname{tr}(D_k G D_k^\top)`. Shape ``(K,)``.
        clarity: Positive where S_k is more than rounding; where N_k is symmetric, as that of an aligned task, it is
            not. Shape ``(K,)``.
    """

    skew: Skew
    rise: Tensor
    change: Tensor
    clarity: Tensor


class SampleSkew:
    r"""S_k as a sum over n samples, :math:`S_k = W_k V^\top - V W_k^\top`: a matrix of rank 2n, never formed.

    With an orthonormal basis Q of V, :math:`V = QT`, and :math:`A_k = W_k T^\top`, we have
    :math:`S_k = Q \Omega_k Q^\top - P_k Q^\top + Q P_k^\top` with :math:`\Omega_k = Q^\top A_k - A_k^\top Q` and
    :math:`P_k = QQ^\top A_k - A_k`, which is orthogonal to Q. By Sherman, Morrison and Woodbury,

    .. math:: \mathrm{cay}(S_k) - I = (2QE_k - P_k) (I - E_k)^{-1} (Q + \tfrac12 P_k)^\top + Q P_k^\top,
        \quad E_k = \tfrac12 \Omega_k - \tfrac14 P_k^\top P_k.

    So a turn costs :math:`O(n m^2)`, and what is inverted is only ``(n, n)``.

    Args:
        tasks: W. Shape ``(K, m, n)``.
        target: V. Shape ``(m, n)``, shared by the tasks.
        half_squared_norm: :math:`\tfrac12 \lVert S_k \rVert_F^2`, if it is known. Shape ``(K,)``.
    """

    def __init__(self, tasks: Tensor, target: Tensor, half_squared_norm: Tensor | None = None) -> None:
        self._W, self._V = tasks.mT, target.mT  # one row per sample
        self._half_squared_norm = half_squared_norm

    def half_squared_norm(self) -> Tensor:
        """From inner products of samples."""
        if self._half_squared_norm is None:
            samples = torch.cat([self._V[None], self._W])
            self._half_squared_norm = _products(samples, samples)[0][:, 1, 1].abs()
        return self._half_squared_norm

    def in_metric(self, metric: Tensor) -> Ascent:
        """In O(n m^2), and again of rank 2n."""
        samples = torch.cat([self._V[None], self._W])
        target, tasks = samples[0], samples[1:]
        # W - c V gives the same S, and avoids cancellation if gradients are almost aligned.
        inner = torch.mv(samples.flatten(1), target.flatten())
        along = (inner[1:] / inner[0]).nan_to_num_(0.0)
        tasks.addcmul_(along[:, None, None], target, value=-1.0)
        solved = _solved(samples, metric)
        products, sizes = _products(samples, solved)
        rise, change = (products[:, 0] + products[:, :, 0]).unbind(1)
        norm = products[:, 1, 1].abs()  # rounding may change the sign of what is zero
        # Rounding is that of the products in D: |V V^T| |W W^T|, which is at least |N|^2, for W - c V and for c V.
        VV, WW = sizes[0], sizes[1:]
        size = torch.addcmul(WW, along, along * VV)
        clarity = torch.addcmul(norm, size, VV, value=-_rounding(norm))
        skew = SampleSkew(solved[1:].mT, solved[0].mT, norm)
        return Ascent(skew, rise, change, clarity=torch.minimum(rise, clarity))

    def turn_(self, matrices: Tensor, step: Tensor) -> None:
        """In O(n m^2)."""
        Q, T = torch.linalg.qr(self._V.mT)
        A = (T @ self._W).mul_(step[:, None, None])  # (K, n, m): A^T of the step
        B = A @ Q
        P = torch.addmm(A.flatten(0, 1), B.flatten(0, 1), Q.mT, beta=-1.0).view(A.shape)
        E = torch.baddbmm(B.mT - B, P, P.mT, beta=0.5, alpha=-0.25)
        onto_Q = matrices @ Q
        left = (matrices @ P.mT).baddbmm_(onto_Q, E, beta=-1.0, alpha=2.0)
        right = _inverse_near_identity(E) @ torch.add(Q.mT, P, alpha=0.5)
        # One product, since every sum into R is rounded.
        matrices.baddbmm_(torch.cat([left, onto_Q], dim=2), torch.cat([right, P], dim=1))


class DenseSkew:
    """S_k as a matrix: for many samples, such as the positions of a map.

    Args:
        correlation: N. Shape ``(K, m, m)``.
    """

    def __init__(self, correlation: Tensor) -> None:
        self._N, self._S = correlation, correlation - correlation.mT

    def half_squared_norm(self) -> Tensor:
        """From the entries."""
        return 0.5 * _norms(self._S).square()

    def in_metric(self, metric: Tensor) -> Ascent:
        """In O(m^3)."""
        inverse = _inverse(metric)
        half = inverse @ self._S
        skew = DenseSkew(half @ (0.5 * inverse))  # D / 2 is skew, up to rounding errors
        clarity = torch.sub(_norms(self._S), _norms(self._N), alpha=_rounding(self._S) ** 0.5)
        rise, change = _dot(self._S, skew._S), _dot(skew._S, half)
        return Ascent(skew, rise, change, clarity=torch.minimum(rise, clarity))

    def turn_(self, matrices: Tensor, step: Tensor) -> None:
        """In O(m^3)."""
        matrices.add_(matrices @ cayley_delta(self._S * step[:, None, None]))


def _products(samples: Tensor, solved: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return inner products of S and :math:`D = G^{-1} S G^{-1}` for sums over samples.

    Args:
        samples: V and the W, one row per sample. Shape ``(K + 1, n, m)``.
        solved: These times :math:`G^{-1}`.

    Returns:
        F, shape ``(K, 2, 2)``, with :math:`F_{00} = \tfrac12 \langle S, D \rangle`, :math:`F_{11} = \tfrac12 \lVert D
        \rVert_F^2` and :math:`F_{01} + F_{10} = \langle D, DG \rangle`; and the norms of the products of ``solved``
        with themselves, shape ``(K + 1,)``.
    """
    count, n, _ = samples.shape
    rows = torch.cat([samples, solved], dim=1)
    own = (rows @ solved.mT).reshape(count, 2, n * n)  # of each with itself
    mixed = (rows[0] @ solved[1:].mT).reshape(count - 1, 2, n, n)  # of V with each
    products = torch.baddbmm(own[1:] @ own[0].mT, mixed.flatten(2), mixed.mT.flatten(2).mT, alpha=-1.0)
    return products, torch.linalg.vector_norm(own[:, 1], dim=1)


def _solved(samples: Tensor, metric: Tensor) -> Tensor:
    r"""Return ``samples``, shape ``(K, n, m)``, times :math:`G^{-1}`, finite."""
    if samples.shape[0] * samples.shape[1] > len(metric):  # more than m: a product is faster than substitutions
        return samples @ _inverse(metric)
    # Its transpose is equal, and stored as LAPACK expects: a copy by rows instead of one by columns.
    solved: Tensor = torch.linalg.solve_ex(metric.mT, samples.flatten(0, 1), left=False).result
    return _finite(solved).view(samples.shape)


def _inverse(metric: Tensor) -> Tensor:
    r"""Return :math:`G^{-1}`, finite.

    By LU, and ``_ex``, which does not wait for the device. Cholesky takes half of the operations, but ``cholesky_ex``
    on a CPU first copies a triangle column by column, which takes longer than the decomposition if m is large.
    """
    inverse: Tensor = torch.linalg.inv_ex(metric.mT).inverse  # its transpose is equal, and copied faster
    return _finite(inverse)


def _finite(solved: Tensor) -> Tensor:
    """Set what a singular metric made infinite or NaN to zero, in place: any finite D is a safe direction."""
    return solved.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner products of matrices; as ``bmm`` of rows with columns, a CPU takes 40 times as long."""
    products: Tensor = torch.linalg.vecdot(one.flatten(1), other.flatten(1))
    return products


def _norms(matrices: Tensor) -> Tensor:
    """Return the Frobenius norms of matrices."""
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2))
    return norms


def _rounding(like: Tensor) -> float:
    return CLEAR * torch.finfo(like.dtype).eps


def cayley_delta(skew: Tensor) -> Tensor:
    r"""Return :math:`Z` with :math:`I + Z = (I - S/2)^{-1}(I + S/2)`, the Cayley transform of ``skew``.

    :math:`Z = (I + S^\top S/4)^{-1}(I + S/2)\,S`: the matrix to invert is symmetric, at least I and well
    conditioned, so a Cholesky decomposition can be used. The usual batched LU returns invalid pivots on the CPU build
    of torch 2.13 once a process has called ``torch.set_num_threads(n)`` with n > 1.

    Args:
        skew: S, skew-symmetric. Shape ``(..., m, m)``, float32 or float64.

    Returns:
        Z, in the shape and dtype of ``skew``. ``R + R @ Z`` drifts less than ``R @ (I + Z)``.

    Example:
        >>> skew = torch.tensor([[0.0, -2.0], [2.0, 0.0]])  # rotates by 2 atan(2 / 2), a right angle
        >>> torch.eye(2) + cayley_delta(skew)
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    gram = skew.mT @ skew  # = -S S
    right = torch.sub(skew, gram, alpha=0.5)
    gram.mul_(0.25).diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor = torch.linalg.cholesky_ex(gram).L  # `_ex`: no device synchronization
    return torch.cholesky_solve(right, factor)


def _inverse_near_identity(E: Tensor) -> Tensor:
    r"""Return :math:`(I - E)^{-1}`, by products alone (batched LU: see above).

    By Newton's iteration, :math:`X \leftarrow 2X - X (I - E) X`, from :math:`I + E`. It takes as many products as
    :math:`\prod_j (I + E^{2^j})`, whose factors soon become so small that a CPU multiplies them many times more slowly.

    Args:
        E: Shape ``(K, n, n)``, of norm at most 0.56. It is overwritten.
    """
    remainder, inverse = -E, E
    for matrix in (remainder, inverse):
        matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
    for _ in range(NEWTON_STEPS[E.dtype]):
        inverse = torch.baddbmm(inverse, inverse, remainder @ inverse, beta=2.0, alpha=-1.0)
    return inverse


@torch.no_grad()
def turn_(matrices: Tensor, skew: Tensor) -> None:
    r"""Set :math:`R_k \leftarrow R_k\,\mathrm{cay}(S_k)` in place, for S of any size.

    Computed in float64, and corrected as a whole: the user's optimizer may make steps of any size. Those of more than
    :data:`MAX_TURN` are shortened to it, since the condition number of the inversion grows with the square.

    Args:
        matrices: R. Shape ``(K, m, m)``.
        skew: S, skew-symmetric. Shape ``(K, m, m)``, radians for small entries. S_k = 0 changes no bit.
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
    P^\top)`, P the columns J of I. A sweep over all columns squares the error, as a full step does.

    Args:
        matrices: R. Shape ``(K, m, m)``.
        first: The first column of J.
        count: The number of columns of J, fewer at the end of the matrix.
        where: Which matrices to correct; no bit of the others changes. Shape ``(K,)``, bool.
    """
    J = slice(first, first + count)
    columns = matrices[:, :, J].clone()
    error = matrices.mT @ columns  # (K, m, count)
    error[:, J].diagonal(dim1=-2, dim2=-1).sub_(1.0)
    error.mul_(where[:, None, None])
    if count < matrices.shape[-1]:  # otherwise both terms that end in P are equal
        change = torch.baddbmm(columns @ error[:, J], matrices, error, beta=-1.0)
        matrices[:, :, J].sub_(change, alpha=0.5)
    matrices.baddbmm_(columns, error.mT, alpha=-0.5)


def determinant_signs(matrices: Tensor) -> Tensor:
    """Return the signs of the determinants of ``matrices``, shape ``(..., m, m)``. Shape ``(...)``.

    From the Householder reflections of a QR decomposition: ``_draw_`` explains why not ``torch.linalg.slogdet``.
    """
    triangular, tau = torch.geqrf(matrices)
    num_reflections = (tau != 0).sum(-1)
    return triangular.diagonal(dim1=-2, dim2=-1).sign().prod(-1) * (1 - 2 * (num_reflections % 2))


def orthogonality_error(matrices: Tensor) -> Tensor:
    r"""Return :math:`\max_{ij} |R^\top R - I|_{ij}` of each matrix. Shape ``(..., m, m)`` to ``(...)``."""
    gram = matrices.mT @ matrices
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return gram.abs().amax(dim=(-2, -1))
