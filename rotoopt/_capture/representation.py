"""Which dimensions of the representation are rotated, the ``(L, d, P)`` view for all computations, and R z."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rotoopt._torch.autocast import is_autocast_on, without_autocast


class RotatedDims:
    """The dimensions of a representation that a rotation mixes.

    A representation of any shape is seen as ``(L, d, P)``: ``d`` features (the dimensions ``dim``, flattened in
    row-major order), ``L`` leading and ``P`` trailing positions. Every position is one sample. The view does not copy
    if the rotated dimensions are adjacent, as with ``dim=-1`` (tokens) or ``dim=1`` (channels).

    Args:
        dim: The rotated dimension or dimensions, negative ones counted from the end. ``None``: the last one, if there
            are two or three.

    Attributes:
        dim: The same as a tuple.
        assumed: Whether ``dim`` was None.
        are_last: Whether it is the last dimension.
    """

    def __init__(self, dim: int | Sequence[int] | None) -> None:
        self.dim = tuple(dim) if isinstance(dim, Sequence) else (-1 if dim is None else dim,)
        self.assumed = dim is None
        self.are_last = self.dim == (-1,)
        if not self.dim or not all(isinstance(i, int) for i in self.dim):
            raise ValueError(f"`dim` must be an int or a non-empty sequence of ints, got {dim!r}.")

    def resolve(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the rotated dimensions of a representation of ``shape``, sorted and counted from zero."""
        ndim = len(shape)
        if self.assumed and ndim > 3:
            raise ValueError(
                "`dim` must be given for a representation of four or more dimensions, got none for shape "
                f"{tuple(shape)}. It is the dimension of the features: dim=1 for maps (B, C, H, W) and volumes "
                "(B, C, D, H, W), dim=-1 for maps (B, H, W, C) and for tokens in windows (B, N, T, C). All others "
                "count as samples."
            )
        if any(not -ndim <= i < ndim for i in self.dim):
            raise ValueError(
                f"`dim` must name dimensions of the representation, got dim={self.dim} for shape {tuple(shape)}. "
                "Use dim=-1 for vectors and token sequences, dim=1 for the channels of a (B, C, H, W) map, and "
                "rotate=False for single numbers."
            )
        dims = tuple(sorted(i % ndim for i in self.dim))
        if len(set(dims)) < len(dims):
            raise ValueError(f"`dim` must not name a dimension twice, got {self.dim} for shape {tuple(shape)}.")
        return dims

    def exist_in(self, shape: torch.Size) -> bool:
        """Whether a representation of ``shape`` has these dimensions."""
        ndim = len(shape)
        if self.assumed and ndim > 3:
            return False
        return ndim > 0 if self.are_last else all(-ndim <= i < ndim for i in self.dim)

    def may_be_samples(self, shape: torch.Size) -> bool:
        """Whether ``dim`` was not given, and ``shape`` has a single dimension, which may contain samples."""
        return self.assumed and len(shape) == 1

    def fit(self, shape: torch.Size, size: int, *, all_of_them: bool) -> bool:
        """Whether there are ``size`` features, or at least as many, along the rotated dimensions."""
        if not self.exist_in(shape):
            return False
        found = shape[-1] if self.are_last else self.size(shape)
        return found == size if all_of_them else found >= size

    def size(self, shape: torch.Size) -> int:
        """Return ``d``, the number of features along the rotated dimensions of a representation of ``shape``."""
        if self.are_last and self.exist_in(shape):
            return shape[-1]  # the same, in the usual case
        return math.prod([shape[i] for i in self.resolve(shape)])  # a list, since torch.compile traces no generator

    def view(self, rep: Tensor) -> Tensor:
        """Return ``rep`` as ``(L, d, P)``."""
        return _group(rep, self.resolve(rep.shape))

    def view_stacked(self, reps: Tensor) -> Tensor:
        """Return K representations, stacked along a new first dimension, as ``(K, L, d, P)``."""
        view = _group(reps, tuple(i + 1 for i in self.resolve(reps.shape[1:])))
        return view.reshape(len(reps), len(view) // len(reps), *view.shape[1:])  # no -1: a batch may be empty

    def lie_side_by_side(self, shape: torch.Size) -> bool:
        """Whether nothing lies between the rotated dimensions, so that :meth:`view` copies nothing."""
        return len(self.dim) == 1 or _adjacent(self.resolve(shape))

    def restore(self, view: Tensor, rep: Tensor) -> Tensor:
        """Undo :meth:`view`: return ``view`` in the shape of ``rep``."""
        dims = self.resolve(rep.shape)
        if _adjacent(dims):
            return view.reshape(rep.shape)
        end = tuple(range(rep.ndim - len(dims), rep.ndim))
        return view.reshape(rep.movedim(dims, end).shape).movedim(end, dims)


def _adjacent(dims: tuple[int, ...]) -> bool:
    return dims[-1] - dims[0] + 1 == len(dims)


def _group(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not _adjacent(dims):
        end = tuple(range(tensor.ndim - len(dims), tensor.ndim))
        tensor, dims = tensor.movedim(dims, end), end
    first, stop = dims[0], dims[-1] + 1
    shape = tensor.shape
    return tensor.reshape(math.prod(shape[:first]), math.prod(shape[first:stop]), math.prod(shape[stop:]))


def rotated(rep: Tensor, matrix: Tensor, dims: RotatedDims, out: Tensor | None = None, *, back: bool = False) -> Tensor:
    r"""Return the rotation of ``rep`` by ``matrix``, in the shape and dtype of ``rep``; autocast does not reach it.

    It is stored like ``rep``, as in channels-last, if that is a permutation: a head may take a view.

    Args:
        rep: z.
        matrix: R. Shape ``(m, m)``.
        dims: The rotated dimensions.
        out: Where to write it. Contiguous, otherwise like ``rep``; the rotated dimensions must lie side by side.
        back: Whether to rotate by the inverse, :math:`R^\top`.
    """
    if out is None and not rep.is_contiguous():
        order = sorted(range(rep.ndim), key=rep.stride, reverse=True)
        places = [order.index(i) for i in range(rep.ndim)]
        stored, inner = rep.permute(order), [places[i] for i in dims.resolve(rep.shape)]
        if stored.is_contiguous() and inner == sorted(inner):
            return rotated(stored, matrix, RotatedDims(inner), back=back).permute(places)
    if is_autocast_on(rep.device):
        with without_autocast(rep.device):
            return rotated(rep, matrix, dims, out, back=back)
    matrix = matrix if matrix.dtype == rep.dtype else matrix.to(rep.dtype)
    if dims.are_last and matrix.shape[-1] == rep.shape[-1]:
        # The same, in the usual case. ONNX has t(), not mT.
        return torch.matmul(rep, matrix if back else matrix.t(), out=out)
    into = None if out is None else dims.view(out)
    return dims.restore(_apply(matrix.mT if back else matrix, dims.view(rep), into), rep)


@torch.no_grad()
def second_moment(rep: Tensor, like: Tensor, dims: RotatedDims) -> Tensor:
    r"""Return :math:`\sum_s z_s z_s^\top` of the features of ``rep`` that ``like``, a rotation, rotates. ``(m, m)``."""
    with without_autocast(rep.device):
        features = dims.view(rep)[:, : like.shape[-1]].to(like)  # (L, m, P)
        samples = features.movedim(1, 2).flatten(0, 1)
        return samples.mT @ samples


def _apply(matrix: Tensor, features: Tensor, out: Tensor | None) -> Tensor:
    """Rotate the first ``m`` of the ``d`` features; the others do not change.

    Args:
        matrix: R. Shape ``(m, m)`` with ``m <= d``, in the dtype of ``features``.
        features: Shape ``(L, d, P)``.
        out: Where to write the result.

    Returns:
        ``[R x_{1:m}, x_{m+1:d}]``, shape ``(L, d, P)``.
    """
    m, d = matrix.shape[-1], features.shape[1]
    first, whole = features[:, :m], out if m == d else None
    if features.shape[2] == 1:  # vectors and tokens: one large product instead of L small ones
        first = torch.mm(first.squeeze(2), matrix.t(), out=None if whole is None else whole.squeeze(2)).unsqueeze(2)
    else:
        first = torch.matmul(matrix, first, out=whole)
    return first if m == d else torch.cat([first, features[:, m:]], dim=1, out=out)
