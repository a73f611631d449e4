"""State, copies, devices and precision of Bi-Tuning."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import BiTuning
from tests.asserts import eps
from tests.contract.models import assert_same
from tests.regularization.bi_tuning_cases import (
    C,
    P,
    batch,
    contrast,
    encoder,
    fill,
    losses_of,
    make,
)
from tests.regularization.networks import COPIES, FEATURES, state


def test_state_dict_has_keys_and_shapes_of_tllib() -> None:
    found = {name: tuple(tensor.shape) for name, tensor in make(K=5).state_dict().items() if "encoder" not in name}
    assert found == {"queue_h": (FEATURES + 1, C, 5), "queue_z": (P, C, 5), "queue_ptr": (C,)}
    parts = {".".join(name.split(".")[:2]) for name in make().state_dict() if "encoder" in name}
    assert parts == {f"encoder_{e}.{part}" for e in "qk" for part in ("backbone", "head", "projector")}


@pytest.mark.parametrize("way", [*COPIES, "state dict"])
def test_copy_continues_like_the_original(way: str) -> None:
    bi_tuning = make()
    bi_tuning(*batch(0))
    if way == "state dict":
        copied = make(seed=7)
        copied.load_state_dict(bi_tuning.state_dict())
    else:
        copied = COPIES[way](bi_tuning)
    saved = state(copied)
    for step in (1, 2):
        outputs = bi_tuning(*batch(step))
        assert_same(state(copied), saved)
    for step in (1, 2):
        others = copied(*batch(step))
    assert_same([each.detach() for each in others], [each.detach() for each in outputs])
    assert_same(state(copied), state(bi_tuning))


def test_queues_are_created_on_the_device_of_the_encoders() -> None:
    bi_tuning = BiTuning(encoder().to("meta"), encoder(1).to("meta"), C)
    assert all(buffer.is_meta for buffer in bi_tuning.buffers())
    assert bi_tuning.queue_z.dtype == bi_tuning.queue_h.dtype == torch.float64


def test_module_moves_as_a_whole() -> None:
    bi_tuning = make(dtype=torch.float32)
    bi_tuning(*batch(0, dtype=torch.float32))
    bi_tuning.double()(*batch(1))
    assert {tensor.dtype for tensor in bi_tuning.state_dict().values()} == {torch.float64, torch.int64}


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not support this device
    bi_tuning = make().to("meta")
    optimizer = RotoGradOptimizer(SGD(bi_tuning.encoder_q.parameters(), lr=0.1), heads=bi_tuning.encoder_q.heads)
    x_q, x_k, labels = (each.to("meta") for each in batch(0, 30))
    for _ in range(2):
        y, logits_z, logits_y, labels_c = bi_tuning(x_q, x_k, labels)
        # `kl_div` of torch reads numbers there.
        losses = [F.cross_entropy(y, labels) - (logits_y * labels_c).sum(), -(logits_z * labels_c).sum()]
        optimizer.zero_grad()
        optimizer.step(losses)
    assert bi_tuning.queue_h.is_meta


def test_compiles_without_graph_breaks() -> None:
    bi_tuning = make()
    compiled = torch.compile(copy.deepcopy(bi_tuning), backend="aot_eager", fullgraph=True)
    for step in range(3):
        assert_close(compiled(*batch(step)), bi_tuning(*batch(step)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1e-4, 0.07, 1e4])
def test_empty_slots_do_not_count_at_any_temperature(T: float) -> None:
    bi_tuning = make(T=T, m=1.0, dtype=torch.float32)
    with torch.no_grad():
        for param in bi_tuning.encoder_k.projector.parameters():
            param.neg_()
    x_q, _, labels = batch(0, 4, dtype=torch.float32)
    for logits in bi_tuning(x_q, x_q, labels)[1:3]:
        assert_same(logits[:, 0], torch.zeros(4))  # the only one, so its probability is one, also with a cosine of -1
    outputs = bi_tuning(*batch(1, 4, dtype=torch.float32))
    for logits in outputs[1:3]:
        assert_close(logits.exp().sum(dim=1), torch.ones(4))
        assert contrast(logits, outputs[3]).isfinite()


def test_key_that_is_not_finite_leaves_its_slot_empty() -> None:
    bi_tuning = make()
    fill(bi_tuning)
    x_q, x_k, labels = batch(9)
    x_k[3] = torch.nan
    assert contrast(*bi_tuning(x_q, x_k, labels)[1::2]).isnan()
    assert (bi_tuning.queue_h[-1] == 0).sum() == 1
    bi_tuning.zero_grad()
    loss = torch.stack(list(losses_of(bi_tuning(*batch(10)), batch(10)[2]).values())).sum()
    torch.autograd.backward(loss)
    assert loss.isfinite()
    assert all(param.grad is None or param.grad.isfinite().all() for param in bi_tuning.parameters())
    assert all(tensor.isfinite().all() for tensor in state(bi_tuning).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_of_half_precision(dtype: torch.dtype) -> None:
    """Up to the rounding of features, logits equal those of float32 with the same weights and keys."""
    bi_tuning, reference = make(dtype=dtype, T=1.0), make(dtype=torch.float32, T=1.0)
    for step in range(3):
        reference.load_state_dict(bi_tuning.state_dict())
        x_q, x_k, labels = batch(step, dtype=dtype)
        outputs, expected = bi_tuning(x_q, x_k, labels), reference(x_q.float(), x_k.float(), labels)
        assert outputs[0].dtype == bi_tuning.queue_h.dtype == dtype
        for each, other in zip(outputs[1:], expected[1:], strict=True):
            assert each.dtype == torch.float32
            assert_close(each, other, rtol=0.0, atol=20 * eps(dtype))  # of cosines, sums of some ten rounded products
        loss = torch.stack(list(losses_of(outputs, labels).values())).sum()
        torch.autograd.backward(loss)
        assert all(param.grad is None or param.grad.isfinite().all() for param in bi_tuning.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_affect_the_logits(dtype: torch.dtype) -> None:
    bi_tuning = make(dtype=torch.float32)
    fill(bi_tuning)
    queue = bi_tuning.queue_z.clone()
    x_q, x_k, labels = batch(9, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        outputs = bi_tuning(x_q, x_k, labels)
        _, z_q, h_q = bi_tuning.encoder_q(x_q)
        _, z_k, _ = bi_tuning.encoder_k(x_k)
    assert all(each.dtype == torch.float32 for each in (*outputs[1:], bi_tuning.queue_h))
    head = bi_tuning.encoder_q.head
    w = F.normalize(torch.cat([head.weight, head.bias[:, None]], dim=1), dim=1)[labels]
    for logits, query, own, keys in ((outputs[1], z_q, z_k, queue), (outputs[2], w, h_q, bi_tuning.queue_h)):
        positives = (query[:, :, None] * keys[:, labels].transpose(0, 1)).sum(dim=1)
        current = (query * own).sum(dim=1, keepdim=True)
        # Products in half precision would be off by 2^-9 / T = 0.03 and more.
        assert_close(logits[:, 1:5] - logits[:, :1], (positives - current) / bi_tuning.T, rtol=0.0, atol=1e-4)
