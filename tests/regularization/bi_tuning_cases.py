"""Small encoders and batches for Bi-Tuning, and comparisons with loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rotoopt.regularization import BiTuning
from rotoopt.regularization.bi_tuning import Classifier
from tests.contract.models import assert_same
from tests.regularization.bi_tuning_oracle import BiTuningOracle, Outputs
from tests.regularization.networks import INPUTS, Backbone

C, P = 3, 4
contrast = nn.KLDivLoss(reduction="batchmean")


def encoder(seed: int = 0, dtype: torch.dtype = torch.float64) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Backbone(), C, projection_dim=P).to(dtype)


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> BiTuning:
    return BiTuning(encoder(seed, dtype), encoder(seed + 1, dtype), C, **{"K": 4, "m": 0.9, **options})


def batch(seed: int, size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, INPUTS, generator=generator, dtype=torch.float64)
    labels = x[:, :C].argmax(dim=1)
    views = x + 0.1 * torch.randn(2, size, INPUTS, generator=generator, dtype=torch.float64)
    return views[0].to(dtype), views[1].to(dtype), labels


def losses_of(outputs: tuple[Tensor, Tensor, Tensor, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Return the losses as a user computes them."""
    y, logits_z, logits_y, labels_c = outputs
    classifier = F.cross_entropy(y, labels) + contrast(logits_y, labels_c)
    return {"classifier": classifier, "projector": contrast(logits_z, labels_c)}


def fill(bi_tuning: BiTuning, seeds: range = range(4)) -> None:
    for seed in seeds:
        bi_tuning(*(each.to(bi_tuning.queue_h) if each.is_floating_point() else each for each in batch(seed, 20)))
    assert (bi_tuning.queue_h[-1] > 0).all()


def assert_outputs(actual: tuple[Tensor, ...], expected: Outputs, tolerance: float = 1e-10) -> None:
    for name, each, other in zip(Outputs._fields, actual, expected, strict=True):
        if name in ("logits_z", "logits_y"):
            assert each.isfinite().all()
            assert_same(each.exp() == 0, other == -torch.inf)
            each, other = (torch.where(other == -torch.inf, 0.0, logits) for logits in (each, other))
        assert_close(each, other, rtol=tolerance, atol=tolerance)


def assert_queues(bi_tuning: BiTuning, expected: BiTuningOracle) -> None:
    assert bi_tuning.queue_ptr.tolist() == expected.pointers
    for c, ring in enumerate(expected.rings):
        for k, key in enumerate(ring):
            h, z = bi_tuning.queue_h[:, c, k], bi_tuning.queue_z[:, c, k]
            if key is None:
                assert not h.any()
                assert not z.any()
            else:
                one = torch.ones(1, dtype=torch.float64)
                assert_close(h, F.normalize(torch.cat([key.h, one]), dim=0), rtol=0.0, atol=1e-12)
                assert_close(z, F.normalize(key.z, dim=0), rtol=0.0, atol=1e-12)
