"""Bi-Tuning: equals loops over samples, classes and slots, also behind rotations; and what it must not do to anyone."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import BiTuning
from rotoopt.regularization.bi_tuning import Classifier
from tests.asserts import eps
from tests.contract.models import assert_same
from tests.regularization.bi_tuning_oracle import BiTuningOracle, Outputs
from tests.regularization.networks import COPIES, FEATURES, INPUTS, Backbone, state, train
from tests.samplers import SEEDS

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


# ---------------------------------------------------------------------- what it computes


@given(
    seed=SEEDS,
    K=st.integers(1, 5),
    m=st.sampled_from([0.0, 0.5, 0.999, 1.0]),
    T=st.sampled_from([0.07, 1.0]),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
)
def test_outputs_gradients_and_queues_are_those_of_loops(
    seed: int, K: int, m: float, T: float, sizes: list[int]
) -> None:
    bi_tuning = make(seed, K=K, m=m, T=T)
    expected = BiTuningOracle(bi_tuning.encoder_q, K, m, T)
    params = list(bi_tuning.encoder_q.parameters())
    optimizer = SGD(params, lr=0.1)
    for step, size in enumerate(sizes):
        x_q, x_k, labels = batch(seed + step, size)
        outputs, theirs = bi_tuning(x_q, x_k, labels), expected(x_q, x_k, labels)
        assert_outputs(outputs, theirs)
        assert_queues(bi_tuning, expected)
        finite = theirs._replace(**{name: getattr(theirs, name).clamp(min=-1e3) for name in ("logits_z", "logits_y")})
        grads, others = (
            torch.autograd.grad(torch.stack(list(losses_of(each, labels).values())).sum(), params)
            for each in (outputs, finite)
        )
        for param, grad, other in zip(params, grads, others, strict=True):
            assert_close(grad, other, rtol=1e-8, atol=1e-10)
            param.grad = grad
        optimizer.step()


@given(seed=SEEDS)
def test_probabilities_and_targets_sum_to_one(seed: int) -> None:
    bi_tuning = make(seed)
    for step in range(3):
        _, logits_z, logits_y, labels_c = bi_tuning(*batch(seed + step))
        for each in (logits_z.exp(), logits_y.exp(), labels_c):
            assert each.shape == (8, 1 + C * 4)
            assert_close(each.sum(dim=1), torch.ones(8, dtype=torch.float64))
        assert (labels_c[:, 5:] == 0).all()  # negatives


def test_contrast_is_cross_entropy_less_the_entropy_of_the_targets() -> None:
    """With full queues: KL = CE - log(K + 1)."""
    bi_tuning = make()
    fill(bi_tuning)
    _, logits_z, logits_y, labels_c = bi_tuning(*batch(9))
    assert_same(labels_c[:, :5], torch.full((8, 5), 1 / 5, dtype=torch.float64))
    for logits in (logits_z, logits_y):
        mean_of_positives = logits[:, :5].mean(dim=1).mean()
        assert_close(contrast(logits, labels_c), -mean_of_positives - math.log(5))


def test_first_step_has_no_contrast() -> None:
    """There is no key yet to compare with; random vectors would pass for positives."""
    bi_tuning = make()
    x_q, x_k, labels = batch(0)
    _, logits_z, logits_y, labels_c = bi_tuning(x_q, x_k, labels)
    assert_same(labels_c[:, 0], torch.ones(8, dtype=torch.float64))
    loss = contrast(logits_z, labels_c) + contrast(logits_y, labels_c)
    assert loss == 0.0
    grads = torch.autograd.grad(loss, list(bi_tuning.encoder_q.backbone.parameters()))
    assert not any(grad.any() for grad in grads)


@given(seed=SEEDS)
def test_order_of_the_batch_does_not_matter(seed: int) -> None:
    """While no ring overflows."""
    bi_tuning = make(seed, K=20)
    bi_tuning(*batch(seed))
    other = copy.deepcopy(bi_tuning)
    parts = batch(seed + 1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    outputs, permuted = bi_tuning(*parts), other(*(each[order] for each in parts))
    assert_close(permuted[0], outputs[0][order])
    assert_close(permuted[1], outputs[1][order])
    losses, others = losses_of(outputs, parts[2]), losses_of(permuted, parts[2][order])
    assert_close(others, losses)
    for queue, theirs in ((bi_tuning.queue_h, other.queue_h), (bi_tuning.queue_z, other.queue_z)):
        assert_close(theirs.sum(dim=2), queue.sum(dim=2))


@given(seed=SEEDS)
def test_names_of_the_classes_do_not_matter(seed: int) -> None:
    bi_tuning = make(seed)
    renamed = torch.randperm(C, generator=torch.Generator().manual_seed(seed))
    other = copy.deepcopy(bi_tuning)
    with torch.no_grad():
        for module in (other.encoder_q.head, other.encoder_k.head):
            module.weight[renamed], module.bias[renamed] = module.weight.clone(), module.bias.clone()
    for step in range(3):
        x_q, x_k, labels = batch(seed + step)
        losses = losses_of(bi_tuning(x_q, x_k, labels), labels)
        assert_close(losses_of(other(x_q, x_k, renamed[labels]), renamed[labels]), losses)
    assert_same(other.queue_ptr[renamed], bi_tuning.queue_ptr)


def test_gradcheck() -> None:
    bi_tuning = make(T=0.5)
    bi_tuning(*batch(0))
    x_q, x_k, labels = batch(1, 4)

    def outputs_of(x: Tensor) -> tuple[Tensor, ...]:
        own = copy.deepcopy(bi_tuning)  # a call changes the queues
        outputs = own(x, x_k, labels)
        return outputs[0], *losses_of(outputs, labels).values()

    assert torch.autograd.gradcheck(outputs_of, x_q.requires_grad_())


def test_who_gets_gradients() -> None:
    """The projector's term trains backbone and projector, the classifier's the backbone, and neither the keys."""
    bi_tuning = make()
    fill(bi_tuning)
    x_q, x_k, labels = batch(9)
    _, logits_z, logits_y, labels_c = bi_tuning(x_q, x_k.requires_grad_(), labels)
    trained = []
    for logits in (logits_z, logits_y):
        bi_tuning.zero_grad()
        torch.autograd.backward(contrast(logits, labels_c), retain_graph=True)
        trained.append({name.split(".")[1] for name, param in bi_tuning.named_parameters() if param.grad is not None})
    assert trained == [{"backbone", "projector"}, {"backbone"}]
    assert not any(param.requires_grad for param in bi_tuning.encoder_k.parameters())
    assert x_k.grad is None


@given(seed=SEEDS, m=st.floats(0, 1), steps=st.integers(1, 5))
def test_key_encoder_is_the_moving_average(seed: int, m: float, steps: int) -> None:
    """k_t = m^t q_0 + (1 - m) sum_s m^(t - s) q_s."""
    bi_tuning = make(seed, m=m)
    query, key = bi_tuning.encoder_q, bi_tuning.encoder_k
    storages = [param.data_ptr() for param in key.parameters()]
    expected = [param.detach().clone() for param in query.parameters()]
    assert_same([param.detach() for param in key.parameters()], expected)
    for step in range(steps):
        with torch.no_grad():
            for param in query.parameters():
                param.add_(torch.randn_like(param))
        expected = [m * each + (1 - m) * q.detach() for each, q in zip(expected, query.parameters(), strict=True)]
        bi_tuning(*batch(seed + step))
    assert_close([param.detach() for param in key.parameters()], expected, rtol=1e-12, atol=1e-12)
    assert [param.data_ptr() for param in key.parameters()] == storages  # views of them stay valid


def test_buffers_of_the_key_encoder_follow() -> None:
    torch.manual_seed(0)
    backbones = [nn.Sequential(nn.Linear(INPUTS, FEATURES), nn.BatchNorm1d(FEATURES)) for _ in range(2)]
    for each in backbones:
        each.out_features = FEATURES  # type: ignore[assignment]
    backbones[0](5 + torch.randn(9, INPUTS))
    query, key = (Classifier(each, C, P) for each in backbones)
    bi_tuning = BiTuning(query, key, C)
    assert_same(state(key), state(query))
    key.eval()  # so that nothing but the update changes the buffers
    bi_tuning(*batch(0, dtype=torch.float32))
    assert_same(dict(key.named_buffers()), dict(query.named_buffers()))


def test_encoder_returns_what_it_says() -> None:
    model, (x, _, _) = encoder(), batch(0)
    h = model.backbone(x)
    y, z, hn = model(x)
    assert_close(y, F.linear(h, model.head.weight, model.head.bias))
    assert_close(z, F.normalize(model.projector(h), dim=1))
    assert_close(hn, F.normalize(torch.cat([h, torch.ones(8, 1, dtype=h.dtype)], dim=1), dim=1))
    assert_same(model.eval()(x), y)
    assert model.head.weight.std() < 0.02
    assert not model.head.bias.any()


@pytest.mark.parametrize("finetune", [False, True])
def test_parameter_groups(finetune: bool) -> None:
    model = Classifier(Backbone(), C, P, finetune, nn.Linear(FEATURES, FEATURES))
    rates = {id(param): group["lr"] for group in model.get_parameters(0.5) for param in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, param in model.named_parameters():
        assert rates[id(param)] == pytest.approx(0.05 if finetune and not name.startswith("head") else 0.5)


def test_signatures_are_tllibs_and_one_more() -> None:
    names = ["encoder_q", "encoder_k", "num_classes", "K", "m", "T", "process_group"]
    assert list(inspect.signature(BiTuning).parameters) == names
    names = ["backbone", "num_classes", "projection_dim", "finetune", "pool_layer"]
    assert list(inspect.signature(Classifier).parameters) == names


# ---------------------------------------------------------------------- state


def test_state_dict_has_keys_and_shapes_of_tllib() -> None:
    found = {name: tuple(tensor.shape) for name, tensor in make(K=5).state_dict().items() if "encoder" not in name}
    assert found == {"queue_h": (FEATURES + 1, C, 5), "queue_z": (P, C, 5), "queue_ptr": (C,)}
    parts = {".".join(name.split(".")[:2]) for name in make().state_dict() if "encoder" in name}
    assert parts == {f"encoder_{e}.{part}" for e in "qk" for part in ("backbone", "head", "projector")}


@pytest.mark.parametrize("way", [*COPIES, "state dict"])
def test_copy_goes_on_as_the_original(way: str) -> None:
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


def test_module_moves_as_a_whole() -> None:
    bi_tuning = make(dtype=torch.float32)
    bi_tuning(*batch(0, dtype=torch.float32))
    bi_tuning.double()(*batch(1))
    assert {tensor.dtype for tensor in bi_tuning.state_dict().values()} == {torch.float64, torch.int64}


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know this device
    bi_tuning = make().to("meta")
    optimizer = RotoGradOptimizer(SGD(bi_tuning.encoder_q.parameters(), lr=0.1), heads=bi_tuning.encoder_q.heads)
    x_q, x_k, labels = (each.to("meta") for each in batch(0, 30))
    for _ in range(2):
        y, logits_z, logits_y, labels_c = bi_tuning(x_q, x_k, labels)
        # `kl_div` of torch asks for numbers there.
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
def test_empty_slots_count_for_nothing_at_any_temperature(T: float) -> None:
    bi_tuning = make(T=T, m=1.0, dtype=torch.float32)
    with torch.no_grad():
        for param in bi_tuning.encoder_k.projector.parameters():
            param.neg_()
    x_q, _, labels = batch(0, 4, dtype=torch.float32)
    for logits in bi_tuning(x_q, x_q, labels)[1:3]:
        assert_same(logits[:, 0], torch.zeros(4))  # alone, and so certain, also with a cosine of -1
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


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_of_half_precision(dtype: torch.dtype) -> None:
    """Up to the rounding of features, logits are those of float32 with the same weights and keys."""
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
def test_autocast_does_not_reach_the_logits(dtype: torch.dtype) -> None:
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


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 0}, "`K` must be at least 1"),
        ({"m": 1.5}, r"`m` in \[0, 1\]"),
        ({"m": -0.1}, r"`m` in \[0, 1\]"),
        ({"T": 0.0}, "`T` positive"),
        ({"T": math.nan}, "`T` positive"),
    ],
)
def test_options_out_of_range_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def sharing_a_layer() -> tuple[Any, Any]:
    query, key = encoder(), encoder(1)
    key.projector = query.projector
    return query, key


def with_another_head() -> tuple[Any, Any]:
    query = encoder()
    query.head = nn.Linear(FEATURES, C, bias=False)  # type: ignore[assignment]
    return query, encoder(1)


def copied_with_rotations() -> tuple[Any, Any]:
    query = encoder()
    RotoGradOptimizer(SGD(query.parameters(), lr=0.1), heads=query.heads)
    return query, copy.deepcopy(query)


SAME = encoder()
BAD_ENCODERS: dict[str, tuple[Callable[[], tuple[Any, Any]], type[Exception], str]] = {
    "one module": (lambda: (SAME, SAME), ValueError, "`encoder_k` must have parameters of its own"),
    "a shared layer": (sharing_a_layer, ValueError, "`encoder_k` must have parameters of its own"),
    "another projection": (
        lambda: (encoder(), Classifier(Backbone(), C, 9)),
        ValueError,
        r"same parameters and buffers, got projector.weight: \(4, 6\) and \(9, 6\)",
    ),
    "another backbone": (
        lambda: (encoder(), Classifier(nn.Linear(INPUTS, FEATURES), C, P)),
        ValueError,
        r"got backbone.0.weight: \(6, 4\) and None",
    ),
    "other classes": (lambda: (encoder(), Classifier(Backbone(), 5, P)), ValueError, "`encoder_k` must have num_cl"),
    "no classifier": (lambda: (encoder(), nn.Linear(3, 3)), TypeError, "`encoder_k` must be a bi_tuning.Classifier"),
    "another head": (with_another_head, TypeError, "`encoder_q` must be a bi_tuning.Classifier with its own head"),
    "rotations": (copied_with_rotations, ValueError, "`encoder_k` must not have rotations"),
}


@pytest.mark.parametrize("name", BAD_ENCODERS)
def test_encoders_that_do_not_fit_are_an_error_that_changes_nothing(name: str) -> None:
    encoders, error, message = BAD_ENCODERS[name]
    query, key = encoders()
    before = state(query), state(key)
    with pytest.raises(error, match=message):
        BiTuning(query, key, C)
    assert_same((state(query), state(key)), before)
    assert all(param.requires_grad for each in (query, key) for param in each.parameters())


BAD_BATCHES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]], str]] = {
    "negative label": (lambda q, k, y: (q, k, y - 1), r"`labels` must be in 0\.\.2, got \[-1"),
    "large label": (lambda q, k, y: (q, k, y + 1), r"`labels` must be in 0\.\.2, got \[3\]"),
    "column of labels": (lambda q, k, y: (q, k, y[:, None]), r"of shape \(8,\), got torch.int64 of shape \(8, 1\)"),
    "too few labels": (lambda q, k, y: (q, k, y[:5]), r"of shape \(8,\), got torch.int64 of shape \(5,\)"),
    "soft labels": (lambda q, k, y: (q, k, F.one_hot(y).double()), "`labels` must be one class number per sample"),
    "fewer keys": (lambda q, k, y: (q, k[:5], y), "must be views of the same samples, got 8 and 5"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_batch_that_does_not_fit_is_an_error_that_changes_nothing(name: str) -> None:
    change, message = BAD_BATCHES[name]
    bi_tuning = make()
    fill(bi_tuning)
    before = state(bi_tuning)
    with pytest.raises(ValueError, match=message):
        bi_tuning(*change(*batch(9)))
    assert_same(state(bi_tuning), before)


@pytest.mark.parametrize("which", ["whole", "encoder_q"])
def test_eval_mode_is_an_error_that_says_what_to_call(which: str) -> None:
    bi_tuning = make()
    (bi_tuning if which == "whole" else bi_tuning.encoder_q).eval()
    with pytest.raises(RuntimeError, match="must be called in training mode, got eval mode"):
        bi_tuning(*batch(0))


def test_empty_batch_is_no_error() -> None:
    bi_tuning = make()
    fill(bi_tuning)
    queues = bi_tuning.queue_h.clone(), bi_tuning.queue_ptr.clone()
    outputs = bi_tuning(*(each[:0] for each in batch(9)))
    assert [tuple(each.shape) for each in outputs] == [(0, C), *[(0, 1 + C * 4)] * 3]
    assert_same((bi_tuning.queue_h, bi_tuning.queue_ptr), queues)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    bi_tuning, other = make(), make()
    x_q, x_k, labels = batch(0)
    assert_same(other(x_q, x_k, labels.to(dtype)), bi_tuning(x_q, x_k, labels))


# ---------------------------------------------------------------------- with RotoGrad


def wrap(bi_tuning: BiTuning, **options: Any) -> RotoGradOptimizer:
    bare = SGD(bi_tuning.encoder_q.get_parameters(0.5), momentum=0.5)
    return RotoGradOptimizer(bare, heads=bi_tuning.encoder_q.heads, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "haar": {"init": "haar"},
    "identity": {},
    "part of the features": {"init": "haar", "rotation_size": 4},
    "classifier alone": {"init": "haar", "rotate": [True, False]},
    "projector alone": {"init": "haar", "rotate": [False, True]},
}


def padded(matrices: Tensor) -> Tensor:
    """Return the rotations of all features."""
    whole = torch.eye(FEATURES, dtype=matrices.dtype).repeat(2, 1, 1)
    whole[:, : matrices.shape[1], : matrices.shape[1]] = matrices
    return whole


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_keys_stay_valid_while_rotations_turn(options: str, seed: int) -> None:
    """What was queued under other rotations is compared as if it had just been rotated by those of now."""
    bi_tuning = make(seed)
    optimizer = wrap(bi_tuning, rotation_lr=0.1, **OPTIONS[options])
    expected = BiTuningOracle(bi_tuning.encoder_q, bi_tuning.K, bi_tuning.m, bi_tuning.T)
    for step in range(6):
        x_q, x_k, labels = batch(10 * seed + step)
        outputs = bi_tuning(x_q, x_k, labels)
        rotations = padded(optimizer.rotations.matrices.clone())
        assert_outputs(outputs, expected(x_q, x_k, labels, rotations), 1e-9)
        assert_queues(bi_tuning, expected)
        optimizer.zero_grad()
        optimizer.step(losses_of(outputs, labels))
    if "init" not in OPTIONS[options] or "rotate" in OPTIONS[options]:
        turned = (optimizer.rotations.matrices - torch.eye(FEATURES, dtype=torch.float64)).abs().amax(dim=(1, 2)) > 0.01
        assert turned.tolist() == OPTIONS[options].get("rotate", [True, True])


def test_task_gradients_are_those_of_the_whole_losses() -> None:
    """The classifier's contrast is a part of its task, and passes through its rotation like the cross-entropy."""
    bi_tuning = make()
    optimizer = wrap(bi_tuning, init="haar")
    fill(bi_tuning)
    expected = BiTuningOracle(bi_tuning.encoder_q, bi_tuning.K, bi_tuning.m, bi_tuning.T)
    expected.encoder_k = copy.deepcopy(bi_tuning.encoder_k)
    x_q, x_k, labels = batch(9)
    other = copy.deepcopy(bi_tuning)
    optimizer.backward(losses_of(bi_tuning(x_q, x_k, labels), labels))
    record = optimizer.last_step
    assert record is not None

    # The same without hooks: rotations folded into copies of the layers, gradients by autograd at h.
    R_head, R_projector = optimizer.rotations.matrices
    for model in (other.encoder_q, other.encoder_k):
        model.head._forward_pre_hooks.clear()
        model.projector._forward_pre_hooks.clear()
        with torch.no_grad():
            model.head.weight.copy_(model.head.weight @ R_head)
            model.projector.weight.copy_(model.projector.weight @ R_projector)
    seen: list[Tensor] = []
    other.encoder_q.pool_layer.register_forward_hook(lambda *args: seen.append(args[2]))
    losses = losses_of(other(x_q, x_k, labels), labels)
    grads = [torch.autograd.grad(loss, seen[0], retain_graph=True)[0] for loss in losses.values()]
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    assert_close(record.grad_norms, torch.stack(norms), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("options", [{}, {"rotate": False}, {"init": "haar"}])
def test_both_heads_are_tasks(options: dict[str, Any]) -> None:
    bi_tuning = make(dtype=torch.float32, m=0.99)
    optimizer = wrap(bi_tuning, rotation_lr=0.02, **options)
    seen: list[Tensor] = []
    bi_tuning.encoder_q.pool_layer.register_forward_hook(lambda *args: seen.append(args[2]))

    def one_batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
        x_q, x_k, labels = batch(step, 24, dtype=torch.float32)
        return losses_of(bi_tuning(x_q, x_k, labels), labels), seen.pop()

    history = train(optimizer, one_batch, 80)
    for task in ("classifier", "projector"):
        first, last = (sum(losses[task] for losses in history[part]) / 10 for part in (slice(3, 13), slice(-10, None)))
        assert last < 0.8 * first
    bi_tuning.eval()
    x, _, labels = batch(999, 200, dtype=torch.float32)
    assert (bi_tuning.encoder_q(x).argmax(dim=1) == labels).float().mean() > 0.8


def test_first_step_is_no_reference_for_the_projector() -> None:
    bi_tuning = make()
    optimizer = wrap(bi_tuning)
    weights = []
    for step in range(3):
        labels = batch(step)[2]
        optimizer.zero_grad()
        optimizer.step(losses_of(bi_tuning(*batch(step)), labels))
        record = optimizer.last_step
        assert record is not None
        assert record.finite
        weights.append((record.grad_norms[1].item(), record.weights[0].item()))
    assert weights[0][0] == 0.0
    assert all(norm > 0 and weight > 0.1 for norm, weight in weights[1:])


def test_resumed_run_is_the_uninterrupted_one() -> None:
    def go_on(bi_tuning: BiTuning, optimizer: RotoGradOptimizer, *steps: int) -> None:
        for step in steps:
            optimizer.zero_grad()
            optimizer.step(losses_of(bi_tuning(*batch(step)), batch(step)[2]))

    whole, part, resumed = make(), make(), make(seed=5)
    go_on(whole, wrap(whole), 0, 1, 2, 3)
    optimizer, other = wrap(part), wrap(resumed)
    go_on(part, optimizer, 0, 1)
    resumed.load_state_dict(part.state_dict())
    other.load_state_dict(optimizer.state_dict())
    go_on(resumed, other, 2, 3)
    assert_same(state(resumed), state(whole))


def test_copy_of_both_goes_on_as_the_original() -> None:
    bi_tuning = make()
    optimizer = wrap(bi_tuning, init="haar", rotation_size=FEATURES)
    copied, other = copy.deepcopy((bi_tuning, optimizer))
    for model, own in ((bi_tuning, optimizer), (copied, other)):
        for step in range(3):
            own.zero_grad()
            own.step(losses_of(model(*batch(step)), batch(step)[2]))
    assert_same(state(copied), state(bi_tuning))
    assert_same(other.rotations.matrices, optimizer.rotations.matrices)


def test_encoder_can_be_folded() -> None:
    bi_tuning, x = make(), batch(0)[0]
    optimizer = wrap(bi_tuning, init="haar")
    y, z, _ = bi_tuning.encoder_q(x)
    optimizer.fold()
    folded = bi_tuning.encoder_q(x)
    assert_close((folded[0], folded[1]), (y, z))
    assert encoder().state_dict().keys() == bi_tuning.encoder_q.state_dict().keys()
