"""Bi-Tuning from its formulas, in float64, one sample, one class and one slot of a queue at a time."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Key(NamedTuple):
    """Features h, not rotated, and projection z of a sample, neither normalized."""

    h: Tensor
    z: Tensor


class Outputs(NamedTuple):
    """The outputs of Bi-Tuning, with log-probabilities of -inf for empty slots."""

    y: Tensor
    logits_z: Tensor
    logits_y: Tensor
    labels_c: Tensor


Ring = list[Key | None]


def enqueue(rings: list[Ring], pointers: list[int], keys: list[Key], labels: list[int]) -> None:
    """Put each key into the ring buffer of its class."""
    for key, label in zip(keys, labels, strict=True):
        rings[label][pointers[label]] = key
        pointers[label] = (pointers[label] + 1) % len(rings[label])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a, b) / (a.square().sum() * b.square().sum()).sqrt()


def with_one(h: Tensor) -> Tensor:
    return torch.cat([h, torch.ones(1, dtype=h.dtype)])


class BiTuningOracle:
    """Has its own key encoder and queues; the query encoder is the trained one.

    Args:
        encoder_q: Has ``backbone``, ``head`` and ``projector``.
        K: Keys per class.
        m: Momentum of the key encoder.
        T: Temperature.
    """

    def __init__(self, encoder_q: Any, K: int, m: float, T: float) -> None:
        self.encoder_q, self.encoder_k = encoder_q, copy.deepcopy(encoder_q)
        self.m, self.T = m, T
        self.rings: list[Ring] = [[None] * K for _ in range(encoder_q.num_classes)]
        self.pointers = [0] * encoder_q.num_classes

    def __call__(self, x_q: Tensor, x_k: Tensor, labels: Tensor, rotations: Tensor | None = None) -> Outputs:
        """Return the outputs for one batch, and update the state.

        Args:
            x_q: Query views.
            x_k: Key views.
            labels: Classes.
            rotations: Rotations in front of classifier and projector. Shape ``(2, d, d)``.
        """
        q = self.encoder_q
        R_head, R_projector = torch.eye(q.features_dim).expand(2, -1, -1).to(x_q) if rotations is None else rotations
        with torch.no_grad():
            self._follow(self.encoder_k, q)
            keys = [self._key(x, R_projector) for x in x_k]
        features = [q.backbone(x) for x in x_q]
        logits_z, filled = [], []
        for h, key, label in zip(features, keys, labels.tolist(), strict=True):
            slots = self._slots(label)
            filled.append([slot is not None for slot in slots])
            z = F.linear(R_projector @ h, q.projector.weight, q.projector.bias)
            compared = [cosine(z, key.z), *(cosine(z, slot.z) if slot is not None else None for slot in slots)]
            logits_z.append(self._log_probabilities(compared))
        enqueue(self.rings, self.pointers, keys, labels.tolist())
        logits_y = []
        for h, label, before in zip(features, labels.tolist(), filled, strict=True):
            w = torch.cat([q.head.weight[label], q.head.bias[label : label + 1]]).detach()
            own = [h, *(slot.h if was and slot else None for slot, was in zip(self._slots(label), before, strict=True))]
            compared = [None if each is None else cosine(w, with_one(R_head @ each)) for each in own]
            logits_y.append(self._log_probabilities(compared))
        y = [F.linear(R_head @ h, q.head.weight, q.head.bias) for h in features]
        K = len(self.rings[0])
        labels_c = torch.zeros(len(x_q), 1 + K * len(self.rings), dtype=x_q.dtype)
        for row, before in zip(labels_c, filled, strict=True):
            positives = [0, *(1 + slot for slot in range(K) if before[slot])]
            row[positives] = 1 / len(positives)
        return Outputs(torch.stack(y), torch.stack(logits_z), torch.stack(logits_y), labels_c)

    def _follow(self, key: nn.Module, query: nn.Module) -> None:
        for k, q in zip(key.parameters(), query.parameters(), strict=True):
            k.copy_(self.m * k + (1 - self.m) * q)

    def _key(self, x: Tensor, R_projector: Tensor) -> Key:
        h = self.encoder_k.backbone(x)
        projector = self.encoder_k.projector
        return Key(h, F.linear(R_projector @ h, projector.weight, projector.bias))

    def _slots(self, label: int) -> Ring:
        """Return the slots of class ``label``, then those of the others, in order."""
        others = [slot for c, ring in enumerate(self.rings) if c != label for slot in ring]
        return [*self.rings[label], *others]

    def _log_probabilities(self, compared: list[Tensor | None]) -> Tensor:
        empty = torch.tensor(-torch.inf, dtype=torch.float64)
        return torch.stack([empty if each is None else each / self.T for each in compared]).log_softmax(dim=0)
