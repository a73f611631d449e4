"""Moves: labels of operations that select or overwrite entries: indices, masks, assignments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotoopt._torch.private import ASSIGNMENT, kept_by_assignment, output_shapes, places_of_entries, saved

PICKS = {"Index", "IndexSelect", "Gather", "MaskedSelect", "Sort", "Topk", "Flip", "Roll", "AsStrided"}
CHOICES = {"Where", "MaskedFill"}
WRITES = {"IndexPut", "IndexCopy", "IndexAdd", "MaskedScatter", ASSIGNMENT}
BY_VALUES = (PICKS | CHOICES | WRITES) - {"Flip", "Roll"}  # of indices and masks


def picked(node: Any, operation: str, labels: Tensor) -> Tensor | None:
    """Return the labels of entries selected from a tensor with ``labels``, which have full size.

    Returns:
        None if the graph does not show which ones, after a backward pass.
    """
    if operation == "Index":
        indices = _indices(node)
        return None if indices is None else labels[indices]
    if operation == "MaskedSelect":
        mask = saved(node, "mask")
        return None if mask is None else labels.masked_select(mask.cpu())
    if operation == "Flip":
        return labels.flip(saved(node, "dims"))
    if operation == "Roll":
        return labels.roll(saved(node, "shifts"), saved(node, "dims"))
    if operation == "AsStrided":  # a view, after entries of it were replaced
        return _moved(node, [labels])
    dim, index = saved(node, "dim"), saved(node, "indices" if operation in {"Sort", "Topk"} else "index")
    if index is None:
        return None
    return labels.index_select(dim, index.cpu()) if operation == "IndexSelect" else labels.gather(dim, index.cpu())


def chosen(node: Any, operation: str, parts: Sequence[Tensor], nothing: Tensor) -> Tensor | None:
    """Return the labels of entries that a mask selects from tensors with labels ``parts``, or fills.

    Args:
        node: The operation in a graph.
        operation: Its name.
        parts: The labels of its inputs.
        nothing: The label of an entry without a task.

    Returns:
        None if the graph does not show which ones, after a backward pass.
    """
    if operation == "Where":
        mask, (there, elsewhere) = saved(node, "condition"), parts
    else:
        mask, elsewhere, there = saved(node, "mask"), parts[0], parts[1] if len(parts) > 1 else nothing
    return None if mask is None else torch.where(mask.cpu(), there, elsewhere)


def written(node: Any, operation: str, labels: Tensor, new: Tensor, nothing: Tensor) -> Tensor | None:
    """Return ``labels`` after some entries were overwritten by others with labels ``new``, both of full size.

    Args:
        node: The operation in a graph.
        operation: Its name.
        labels: The labels of the tensor.
        new: The labels of what is written to it.
        nothing: The label of an entry without a task.

    Returns:
        None if the graph does not show which ones: after a backward pass, or if they were added to others.
    """
    if operation in {"IndexCopy", "IndexAdd"}:
        dim, index = saved(node, "dim"), saved(node, "index")
        if index is None:
            return None
        index = index.cpu()
        adds = operation == "IndexAdd" and bool((labels.index_select(dim, index) != nothing).any())
        return None if adds or len(index.unique()) < len(index) else labels.index_copy(dim, index, new)
    if operation == "MaskedScatter":
        mask = saved(node, "mask")
        return None if mask is None else labels.masked_scatter(mask.cpu(), new)
    if operation == "IndexPut":
        indices = None if saved(node, "accumulate") else _indices(node)
        return None if indices is None else labels.clone().index_put_(indices, new)
    if len(torch.unique(new)) != 1:
        return _moved(node, [labels, new])
    kept = kept_by_assignment(node)
    return None if kept is None else torch.where(kept.cpu(), labels, new.flatten()[0])


def _moved(node: Any, parts: Sequence[Tensor]) -> Tensor | None:
    """Return the labels of entries moved one by one from inputs with labels ``parts``; None if they are not."""
    places = places_of_entries(node)
    if places is None or len(places) != len(parts):
        return None
    labels, index = torch.cat([part.flatten() for part in parts]), torch.cat(places).cpu()
    (shape,) = output_shapes(node)
    is_kept = index >= 0
    return labels.new_empty(int(is_kept.sum())).index_put_((index[is_kept],), labels[is_kept]).reshape(shape)


def _indices(node: Any) -> tuple[Any, ...] | None:
    indices = saved(node, "indices")
    return None if indices is None else tuple(slice(None) if each is None else each.cpu() for each in indices)
