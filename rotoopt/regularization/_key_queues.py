"""Key queues: the latest keys of every class, in ring buffers that are filled without loops or synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def enqueue_(queues: Sequence[Tensor], pointers: Tensor, keys: Sequence[Tensor], labels: Tensor) -> None:
    """Append every key to the ring buffer of its class, overwriting the oldest; equivalent to a loop over the keys.

    Args:
        queues: Ring buffers of K keys for C classes, changed in place. Shapes ``(D, C, K)``.
        pointers: The slot for the next key of each class, changed in place. Shape ``(C,)``, int64.
        keys: The keys for each of ``queues``. Shapes ``(N, D)``.
        labels: Their classes, in 0..C-1. Shape ``(N,)``, int64.

    Example:
        >>> queue, pointers = torch.zeros(1, 2, 3), torch.zeros(2, dtype=torch.long)
        >>> enqueue_([queue], pointers, [torch.tensor([[1.0], [2.0], [3.0], [4.0]])], torch.tensor([0, 1, 0, 0]))
        >>> enqueue_([queue], pointers, [torch.tensor([[5.0]])], torch.tensor([0]))
        >>> queue[0], pointers
        (tensor([[5., 3., 4.],
                [2., 0., 0.]]), tensor([1, 1]))
    """
    size = queues[0].shape[2]
    labels, order = labels.sort(stable=True)
    classes = torch.arange(len(pointers), device=labels.device)
    first = torch.searchsorted(labels, classes)
    counts = torch.searchsorted(labels, classes, right=True) - first
    place = torch.arange(len(labels), device=labels.device)
    rank = place - first.gather(0, labels)
    slot = (pointers.gather(0, labels) + rank) % size
    # A class with more than K keys wraps around: all keys of one slot write the last of them.
    last = place + (counts.gather(0, labels) - 1 - rank) // size * size
    for queue, each in zip(queues, keys, strict=True):
        queue[:, labels, slot] = each[order[last]].to(queue.dtype).mT
    pointers.copy_((pointers + counts) % size)
