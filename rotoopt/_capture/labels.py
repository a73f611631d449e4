"""Labels: which task each entry of a tensor depends on, operation by operation, as far as a graph shows.

The labels of a tensor are a tensor with its dimensions, each of the same size, or of size one if the label is constant
along it. A label is the number of a task, or one of those below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotoopt._capture.moves import CHOICES, PICKS, WRITES, chosen, picked, written
from rotoopt._torch.private import ASSIGNMENT, entries_of_change, output_shapes, saved

NONE = -1  # depends on no task
MIXED = -2  # depends on several tasks
UNTOLD = -3  # unknown: one of many outputs of a function without a rule, such as a compiled graph

Shape = tuple[int, ...]

# One output entry for one entry of each input, broadcast.
ELEMENTWISE = {"Add", "Sub", "Rsub", "Neg", "Mul", "Div", "Pow", "Exp", "Expm1", "Log", "Log1P", "Log2", "Log10"}
ELEMENTWISE |= {"Sqrt", "Rsqrt", "Reciprocal", "Abs", "Sgn", "Sign", "Sin", "Cos", "Tanh", "Sigmoid", "LogSigmoid"}
ELEMENTWISE |= {"Erf", "Relu", "LeakyRelu", "PreluKernel", "Elu", "Gelu", "Silu", "Mish", "Softplus", "Hardtanh"}
ELEMENTWISE |= {"Threshold", "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Where", "MaskedFill", "Lerp"}
ELEMENTWISE |= {"Addcmul", "Addcdiv", "Atan2", "Xlogy", "Logaddexp", "NativeDropout", "Alias", "Clone", "ToCopy"}
ELEMENTWISE |= {"Expand", "NanToNum", "Logit", "Hardsigmoid", "Hardswish", "Celu", "Softshrink", "Hardshrink", "Erfc"}
ELEMENTWISE |= {"Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Hypot", "Round", "Floor", "Fmod", "Remainder"}
RESHAPING = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"}
REARRANGING = RESHAPING | {"Select", "Slice", "Split", "SplitWithSizes", "Unbind", "Permute", "Transpose", "T"}
REDUCING = {"Sum", "Mean", "LinalgVectorNorm", "Norm", "Amax", "Amin", "Max", "Min", "Logsumexp", "Var", "Std", "Prod"}
REDUCING |= {"Nansum"}
ALONG = {"Softmax", "LogSoftmax", "Cumsum"}  # of all entries along a dimension, which is kept
MATRIX_PRODUCTS = {"Mm", "Bmm", "Addmm", "Baddbmm"}  # of the last two inputs, in front of which a bias may be added
# Elementwise losses, and losses with an entry for each class, which are added up unless `reduction` is none.
LOSSES = {"MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"}
LOSSES |= {"SoftMarginLoss"}
CLASS_LOSSES = {"NllLoss", "NllLoss2D"}


def whole(label: int, shape: Shape) -> Tensor:
    """Return ``label`` for all entries of a tensor of ``shape``."""
    return torch.full((1,) * len(shape), label, dtype=torch.int16, device="cpu")


def together(parts: Sequence[Tensor]) -> Tensor:
    """Return the labels of an elementwise function of tensors with labels ``parts``, broadcast."""
    alike = torch.broadcast_tensors(*parts)  # type: ignore[no-untyped-call]
    return reduced(torch.stack(alike), (0,), keepdim=False)


def reduced(labels: Tensor, dims: Sequence[int], *, keepdim: bool) -> Tensor:
    """Return the labels of a function of all entries along ``dims``."""
    if not dims or not labels.numel():
        return labels
    of_tasks = labels >= 0
    first = torch.where(of_tasks, labels, torch.iinfo(labels.dtype).max).amin(tuple(dims), keepdim=keepdim)
    last = torch.where(of_tasks, labels, NONE).amax(tuple(dims), keepdim=keepdim)
    out = torch.where((last != NONE) & (first != last), MIXED, last)
    for label in (UNTOLD, MIXED):
        out = torch.where((labels == label).sum(tuple(dims), keepdim=keepdim) > 0, label, out)
    return out


def labels_of_outputs(
    node: Any, operation: str, parts: Sequence[Tensor], shapes: Sequence[Shape | None]
) -> list[Tensor]:
    """Return the labels of all outputs of an operation.

    Args:
        node: The operation in a graph.
        operation: Its name, such as ``"Addmm"``.
        parts: The labels of its inputs; those of an input without gradient have no dimension.
        shapes: The shapes of its inputs, None if unknown.
    """
    out_shapes = output_shapes(node)
    found = _labels(node, operation, parts, shapes, out_shapes)
    if len(found) == len(out_shapes) and all(map(_fits, found, out_shapes)):
        return found
    (label,) = reduced(torch.cat([part.flatten() for part in parts]), (0,), keepdim=True).tolist()
    return [whole(label, shape) for shape in out_shapes]


def labels_of_sum(node: Any, operation: str, parts: Sequence[Tensor]) -> Tensor | None:
    """Return the labels of the terms that a loss function adds up; None if it is not a loss function."""
    if operation in LOSSES:
        return together(parts)
    if operation in CLASS_LOSSES:
        return reduced(parts[0], (min(1, parts[0].ndim - 1),), keepdim=False)
    return None


def narrowed(labels: Tensor, dim: int, start: int, end: int, step: int = 1) -> Tensor:
    """Return the labels of a slice along ``dim``."""
    if labels.shape[dim] == 1:
        return labels
    index = [slice(None)] * labels.ndim
    index[dim] = slice(start, end, step)
    return labels[tuple(index)]


def _fits(labels: Tensor, shape: Shape) -> bool:
    return labels.ndim == len(shape) and all(m in (1, n) for m, n in zip(labels.shape, shape, strict=True))


def _labels(
    node: Any, operation: str, parts: Sequence[Tensor], shapes: Sequence[Shape | None], out_shapes: Sequence[Shape]
) -> list[Tensor]:
    """Return the labels of all outputs, an empty list if there is no rule."""
    moved = _moved(node, operation, parts, shapes, out_shapes[0]) if operation in CHOICES | PICKS | WRITES else None
    if moved is not None:
        return [moved] * len(out_shapes)
    if operation in ELEMENTWISE:
        labels = together(parts)
        return [labels.reshape((1,) * (len(out_shapes[0]) - labels.ndim) + labels.shape)]
    if operation in {"Cat", "Stack"}:
        return _joined(operation, parts, shapes, saved(node, "dim"), out_shapes[0])
    if operation in MATRIX_PRODUCTS:
        ndim = len(out_shapes[0])
        left, right = (part.expand((1,) * (ndim - part.ndim) + part.shape) for part in parts[-2:])
        rows, columns = reduced(left, (-1,), keepdim=True), reduced(right, (-2,), keepdim=True)
        return [together([*parts[:-2], rows, columns])]
    summed = labels_of_sum(node, operation, parts)
    if summed is not None:
        return [reduced(summed, range(summed.ndim), keepdim=False) if saved(node, "reduction") else summed]
    (labels,), shape = parts[:1], shapes[0]
    if shape is None:
        return []
    if operation in RESHAPING:
        return [labels.expand(shape).reshape(out_shapes[0])]
    if operation == "Permute":
        return [labels.permute(saved(node, "dims"))]
    if operation == "Transpose":
        return [labels.transpose(saved(node, "dim0"), saved(node, "dim1"))]
    if operation == "T":
        return [labels.mT]
    dim = saved(node, "dim")
    if operation in REDUCING:
        dims = range(labels.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
        return [reduced(labels, dims, keepdim=bool(saved(node, "keepdim")))] * len(out_shapes)
    if operation in ALONG:
        return [reduced(labels, (dim,), keepdim=True)]
    if operation == "Select":
        index = saved(node, "index") % shape[dim]
        return [narrowed(labels, dim, index, index + 1).squeeze(dim)]
    if operation == "Slice":
        return [narrowed(labels, dim, saved(node, "start"), saved(node, "end"), saved(node, "step"))]
    if operation == "Unbind":
        return [narrowed(labels, dim, i, i + 1).squeeze(dim) for i in range(len(out_shapes))]
    if operation in {"Split", "SplitWithSizes"}:
        ends = torch.tensor([each[dim] for each in out_shapes], device="cpu").cumsum(0).tolist()
        return [narrowed(labels, dim, end - each[dim], end) for end, each in zip(ends, out_shapes, strict=True)]
    return []


def _moved(
    node: Any, operation: str, parts: Sequence[Tensor], shapes: Sequence[Shape | None], out_shape: Shape
) -> Tensor | None:
    """Return the labels of entries that were moved unchanged; None if the graph does not show it."""
    if operation in CHOICES:
        return chosen(node, operation, parts, whole(NONE, ()))
    if operation in WRITES:
        old, new = parts[0].expand(out_shape), whole(NONE, ())  # of x[part] = 0
        if len(parts) > 1:
            new = parts[1].expand(shapes[1] or ())
        labels = written(node, operation, old, new, whole(NONE, ()))
        return _changed(node, old, new) if labels is None and operation == ASSIGNMENT else labels
    return None if shapes[0] is None else picked(node, operation, parts[0].expand(shapes[0]))


def _changed(node: Any, labels: Tensor, new: Tensor) -> Tensor | None:
    """Return ``labels`` after entries were changed, each by at most one entry with labels ``new``."""
    found = entries_of_change(node)
    if found is None or new.numel() not in (1, len(found[1])):
        return None
    remains, index = (each.cpu() for each in found)
    out = torch.where(remains, labels.flatten(), NONE)
    changes = index >= 0
    if changes.any():
        out[index[changes]] = together([out[index[changes]], new.flatten().expand(len(index))[changes]])
    return out.reshape(labels.shape)


def _joined(
    operation: str, parts: Sequence[Tensor], shapes: Sequence[Shape | None], dim: int, out_shape: Shape
) -> list[Tensor]:
    dim %= len(out_shape)
    known = [shape for shape in shapes if shape is not None]
    if operation == "Stack":
        sizes = [1] * len(parts)
        parts = [part.reshape((1,) * (len(out_shape) - 1 - part.ndim) + part.shape) for part in parts]
        parts = [part.unsqueeze(dim) for part in parts]
    else:
        rest = out_shape[dim] - sum(shape[dim] for shape in known)
        if len(shapes) - len(known) > 1 and rest:  # several tensors without gradient, of unknown sizes
            return []
        sizes = [rest if shape is None else shape[dim] for shape in shapes]
        parts = [part.reshape((1,) * (len(out_shape) - part.ndim) + part.shape) for part in parts]
    others = [max(part.shape[i] for part in parts) for i in range(len(out_shape))]
    return [
        torch.cat(
            [
                part.expand([size if i == dim else other for i, other in enumerate(others)])
                for part, size in zip(parts, sizes, strict=True)
            ],
            dim,
        )
    ]
