"""Bi-Tuning equals loops over samples, classes and slots."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt.regularization import BiTuning
from rotoopt.regularization.bi_tuning import Classifier
from tests.contract.models import assert_same
from tests.regularization.bi_tuning_cases import (
    C,
    P,
    assert_outputs,
    assert_queues,
    batch,
    contrast,
    encoder,
    fill,
    losses_of,
    make,
)
from tests.regularization.bi_tuning_oracle import BiTuningOracle
from tests.regularization.networks import FEATURES, INPUTS, Backbone, state
from tests.samplers import SEEDS


@given(
    seed=SEEDS,
    K=st.integers(1, 5),
    m=st.sampled_from([0.0, 0.5, 0.999, 1.0]),
    T=st.sampled_from([0.07, 1.0]),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
)
def test_outputs_gradients_and_queues_equal_loops(seed: int, K: int, m: float, T: float, sizes: list[int]) -> None:
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


def test_contrast_is_cross_entropy_minus_the_entropy_of_the_targets() -> None:
    """With full queues: KL = CE - log(K + 1)."""
    bi_tuning = make()
    fill(bi_tuning)
    _, logits_z, logits_y, labels_c = bi_tuning(*batch(9))
    assert_same(labels_c[:, :5], torch.full((8, 5), 1 / 5, dtype=torch.float64))
    for logits in (logits_z, logits_y):
        mean_of_positives = logits[:, :5].mean(dim=1).mean()
        assert_close(contrast(logits, labels_c), -mean_of_positives - math.log(5))


def test_first_step_has_no_contrast() -> None:
    """There are no keys yet; random vectors would be used as positives."""
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
    """As long as no ring buffer overflows."""
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
    """The projector's term trains backbone and projector, the classifier's the backbone; none trains the keys."""
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
    key.eval()  # so that only the update changes the buffers
    bi_tuning(*batch(0, dtype=torch.float32))
    assert_same(dict(key.named_buffers()), dict(query.named_buffers()))


def test_encoder_returns_the_documented_outputs() -> None:
    model, (x, _, _) = encoder(), batch(0)
    h = model.backbone(x)
    y, z, hn = model(x)
    assert_close(y, F.linear(h, model.head.weight, model.head.bias))
    assert_close(z, F.normalize(model.projector(h), dim=1))
    assert_close(hn, F.normalize(torch.cat([h, torch.ones(8, 1, dtype=h.dtype)], dim=1), dim=1))
    assert_same(model.eval()(x), y)
    assert model.head.weight.std() < 0.02
    assert not model.head.bias.any()
    assert model.heads == {"classifier": model.head, "projector": model.projector}


@given(seed=SEEDS)
def test_encoder_pools_the_output_of_the_backbone(seed: int) -> None:
    torch.manual_seed(seed)
    pool = nn.Linear(FEATURES, FEATURES)
    model, x = Classifier(Backbone(), C, P, pool_layer=pool), torch.randn(7, INPUTS)
    y, z, _ = model(x)
    h = pool(model.backbone(x))
    assert_same(model.represent(x), h)
    assert_same((y, z), (model.head(h), F.normalize(model.projector(h))))


@pytest.mark.parametrize("finetune", [False, True])
def test_parameter_groups(finetune: bool) -> None:
    model = Classifier(Backbone(), C, P, finetune, nn.Linear(FEATURES, FEATURES))
    rates = {id(param): group["lr"] for group in model.get_parameters(0.5) for param in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, param in model.named_parameters():
        assert rates[id(param)] == pytest.approx(0.05 if finetune and not name.startswith("head") else 0.5)


def test_defaults_are_those_of_tllib() -> None:
    model = Classifier(Backbone(), C)
    assert model.projector.out_features == model.projection_dim == 128
    assert [group["lr"] for group in model.get_parameters()] == [0.1, 1.0, 0.1]
    bi_tuning = BiTuning(model, copy.deepcopy(model), C)
    assert (bi_tuning.K, bi_tuning.m, bi_tuning.T) == (40, 0.999, 0.07)


def test_signatures_are_those_of_tllib_plus_one_argument() -> None:
    names = ["encoder_q", "encoder_k", "num_classes", "K", "m", "T", "process_group"]
    assert list(inspect.signature(BiTuning).parameters) == names
    names = ["backbone", "num_classes", "projection_dim", "finetune", "pool_layer"]
    assert list(inspect.signature(Classifier).parameters) == names
