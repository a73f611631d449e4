"""LWF: what the distillation loss is, that the source head stays as it was, and records that belong to samples."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import co_tuning, lwf
from rotoopt.regularization.lwf import distillation_loss, record_logits
from tests.asserts import eps
from tests.contract.models import assert_same
from tests.regularization.networks import COPIES, FEATURES, INPUTS, NUM_SOURCE, NUM_TARGET, Backbone, state, train
from tests.samplers import SEEDS

FORMS = ["kl", "cross_entropy"]


def logits(seed: int, scale: float = 1.0, shape: tuple[int, int] = (4, 5)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student, teacher


def oracle(student: Tensor, teacher: Tensor, T: float, form: str) -> float:
    """The mean of sum_i p_i log(p_i / q_i), or of -sum_i p_i log q_i, one number at a time."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = ([math.exp(each / T) for each in row] for row in (s, t))
        q, p = ([each / math.fsum(row) for each in row] for row in (q, p))
        base = p if form == "kl" else [1.0] * len(p)
        total += math.fsum(a * math.log(c / b) for a, b, c in zip(p, q, base, strict=True))
    return total / len(student)


@pytest.mark.parametrize("form", FORMS)
@given(seed=SEEDS, T=st.floats(0.5, 10), scale=st.floats(0, 5))
def test_distillation_is_its_formula(form: Any, seed: int, T: float, scale: float) -> None:
    student, teacher = logits(seed, scale)
    loss = distillation_loss(student, teacher, T, form=form)
    assert_close(float(loss), oracle(student, teacher, T, form), rtol=1e-12, atol=1e-14)


@given(seed=SEEDS, T=st.floats(0.5, 10))
def test_distillation_is_torchs_kl_divergence(seed: int, T: float) -> None:
    student, teacher = logits(seed)
    expected = F.kl_div((student / T).log_softmax(dim=1), (teacher / T).softmax(dim=1), reduction="batchmean")
    assert_close(distillation_loss(student, teacher, T), expected, rtol=1e-12, atol=1e-15)


@given(seed=SEEDS, T=st.floats(0.5, 10))
def test_both_forms_have_the_gradient_of_the_closed_form(seed: int, T: float) -> None:
    student, teacher = logits(seed)
    student.requires_grad_()
    expected = ((student / T).softmax(dim=1) - (teacher / T).softmax(dim=1)).detach() / (T * len(student))
    for form in ("kl", "cross_entropy"):
        (grad,) = torch.autograd.grad(distillation_loss(student, teacher, T, form=form), student)
        assert_close(grad, expected, rtol=1e-12, atol=1e-16)


@given(seed=SEEDS, shift=st.floats(-50, 50), scale=st.floats(0, 5))
def test_distillation_does_not_see_order_or_shifts(seed: int, shift: float, scale: float) -> None:
    student, teacher = logits(seed, scale)
    loss = distillation_loss(student, teacher)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(4, generator=generator), torch.randperm(5, generator=generator)
    permuted = distillation_loss(student[rows][:, columns], teacher[rows][:, columns])
    assert_close(permuted, loss, rtol=1e-12, atol=1e-14)
    assert_close(distillation_loss(student + shift, teacher - shift), loss, rtol=1e-10, atol=1e-12)
    assert loss >= -1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_agreement_is_zero_with_zero_gradient(dtype: torch.dtype) -> None:
    teacher = (10 * torch.randn(4, 5)).to(dtype)
    student = teacher.clone().requires_grad_()
    loss = distillation_loss(student, teacher, 3.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0.0
    assert student.grad is not None
    assert student.grad.abs().max() <= eps(torch.promote_types(dtype, torch.float32))
    assert distillation_loss(student, teacher, 3.0, form="cross_entropy") > 0.0


@pytest.mark.parametrize("form", FORMS)
def test_distillation_gradcheck(form: Any) -> None:
    student, teacher = logits(0)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, 2.0, form=form), student)
    assert torch.autograd.gradgradcheck(lambda s: distillation_loss(s, teacher, 2.0, form=form), student)


@pytest.mark.parametrize("form", FORMS)
def test_teacher_gets_no_gradient(form: Any) -> None:
    student, teacher = (each.requires_grad_() for each in logits(0))
    distillation_loss(student, teacher, form=form).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", ["teacher", "both"])
def test_masked_classes_count_as_impossible(form: Any, masked: str) -> None:
    student, teacher = logits(0)
    teacher[:, 0] = -torch.inf
    if masked == "both":
        student[:, 0] = -torch.inf
        expected = distillation_loss(student[:, 1:], teacher[:, 1:], form=form)
    else:
        expected = distillation_loss(student, teacher.clamp(min=-1e5), form=form)
    student.requires_grad_()
    loss = distillation_loss(student, teacher, form=form)
    loss.backward()  # type: ignore[no-untyped-call]
    assert_close(loss, expected, rtol=1e-12, atol=0.0)
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("form", FORMS)
def test_nan_is_not_hidden(form: Any, which: str) -> None:
    student, teacher = logits(0)
    (student if which == "student" else teacher)[0, 0] = torch.nan
    assert distillation_loss(student, teacher, form=form).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(form: Any, dtype: torch.dtype, autocast: bool) -> None:
    student, teacher = (each.to(dtype) for each in logits(0, scale=30.0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = distillation_loss(student, teacher, 3.0, form=form)
    assert loss.dtype == torch.float32
    assert_same(loss, distillation_loss(student.float(), teacher.float(), 3.0, form=form))


@pytest.mark.parametrize("shapes", [((4, 5), (4, 1)), ((4, 5), (5,)), ((4, 5), (1, 5)), ((5,), (5,)), ((2, 3, 5),) * 2])
def test_other_shapes_are_an_error(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"`student` and `teacher` must have one shape \(b, N\), got"):
        distillation_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize("options", [{"T": 0.0}, {"T": -1.0}, {"T": math.nan}, {"form": "mse"}])
def test_options_out_of_range_are_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`T` must be positive and `form` one of"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), **options)


# ---------------------------------------------------------------------- the classifier

Make = Callable[..., lwf.Classifier]
CLASSIFIERS: dict[str, Make] = {"LWF": lwf.Classifier, "Co-Tuning": co_tuning.Classifier}


def make(name: str = "LWF", *, bottleneck: bool = False, seed: int = 0) -> lwf.Classifier:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"bottleneck": nn.Linear(FEATURES, 4), "bottleneck_dim": 4} if bottleneck else {}
    return CLASSIFIERS[name](Backbone(), NUM_TARGET, nn.Linear(FEATURES, NUM_SOURCE), **options)


def inputs(batch: int = 0, size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(size, INPUTS, generator=generator)
    return x, x[:, :NUM_TARGET].argmax(dim=1)


def test_signature_is_tllibs() -> None:
    names = ["backbone", "num_classes", "head_source", "head_target", "bottleneck", "bottleneck_dim", "finetune"]
    assert list(inspect.signature(lwf.Classifier).parameters) == [*names, "pool_layer"]


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_outputs_are_those_of_the_parts(name: str, bottleneck: bool) -> None:
    classifier, (x, _) = make(name, bottleneck=bottleneck), inputs()
    f = classifier.backbone(x)
    y_s, y_t = classifier(x)
    assert_same(y_s, classifier.head_source(f))
    assert_same(y_t, classifier.head_target(classifier.bottleneck(f)))
    assert_same(classifier.predict(classifier.represent(x)), (y_s, y_t))
    assert_same(classifier.predict_source(x), y_s)
    assert_same(classifier.eval()(x), y_t)
    assert y_t.shape == (7, NUM_TARGET)
    assert classifier.features_dim == (4 if bottleneck else FEATURES)


def test_keys_of_the_state_dict_are_tllibs() -> None:
    modules = {key.split(".")[0] for key in make(bottleneck=True).state_dict()}
    assert modules == {"backbone", "bottleneck", "head_source", "head_target"}


def test_default_pooling_is_the_mean_over_positions() -> None:
    class Maps(nn.Conv2d):
        out_features = FEATURES

    classifier = lwf.Classifier(Maps(2, FEATURES, 3), NUM_TARGET, nn.Linear(FEATURES, NUM_SOURCE))
    x = torch.randn(3, 2, 5, 6)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())(classifier.backbone(x))
    assert_close(classifier.represent(x), pooled)


@pytest.mark.parametrize("shape", [(FEATURES, 4, 4), (2, 7, FEATURES), (2, FEATURES, 3, 3, 3)])
def test_default_pooling_refuses_what_is_neither_map_nor_vector(shape: tuple[int, ...]) -> None:
    backbone = nn.Identity()
    backbone.out_features = FEATURES  # type: ignore[assignment]
    head = nn.Linear(FEATURES, NUM_SOURCE)
    with pytest.raises(ValueError, match=r"must return vectors \(b, c\) or maps \(b, c, h, w\), got shape"):
        lwf.Classifier(backbone, NUM_TARGET, head)(torch.randn(shape))
    tokens = lwf.Classifier(backbone, NUM_TARGET, head, pool_layer=nn.Identity())
    assert tokens(torch.randn(2, 7, FEATURES))[1].shape == (2, 7, NUM_TARGET)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head_source": None}, TypeError, "`head_source` must be the head of the source model, got None"),
        ({"bottleneck": nn.Linear(6, 4)}, ValueError, "`bottleneck_dim` must be the number of features"),
        ({"head_target": nn.Linear(6, 2)}, ValueError, "`head_target` must have num_classes=3 outputs"),
        ({"backbone": nn.Tanh()}, ValueError, "`backbone` must say how many features it has .* out_features=None"),
    ],
)
def test_what_does_not_fit_is_an_error_at_construction(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    fitting: dict[str, Any] = {"backbone": Backbone(), "num_classes": 3, "head_source": nn.Linear(6, 5)}
    with pytest.raises(error, match=message):
        lwf.Classifier(**{**fitting, **options})


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_parameter_groups(name: str, finetune: bool) -> None:
    """Every trainable parameter is in one group: the new layers at the base rate, pretrained ones at a tenth."""
    pool = nn.Linear(FEATURES, FEATURES)
    bottleneck, head = nn.Linear(FEATURES, 4), nn.Linear(FEATURES, NUM_SOURCE)
    classifier = CLASSIFIERS[name](Backbone(), NUM_TARGET, head, None, bottleneck, 4, finetune, pool)
    rates = {id(param): group["lr"] for group in classifier.get_parameters(0.5) for param in group["params"]}
    new = ("bottleneck", "head_target")
    trainable = {key: param for key, param in classifier.named_parameters() if param.requires_grad}
    assert {key.split(".")[0] for key in trainable} == {
        *("backbone", "pool_layer", *new),
        *(["head_source"] if name == "Co-Tuning" else []),
    }
    assert len(rates) == len(trainable)
    for key, param in trainable.items():
        assert rates[id(param)] == pytest.approx(0.05 if finetune and not key.startswith(new) else 0.5)
    torch.optim.SGD(classifier.get_parameters(0.5))


def test_source_head_gathers_no_gradients() -> None:
    classifier, (x, labels) = make(), inputs()
    for _ in range(3):
        y_s, y_t = classifier(x)
        (y_s.sum() + F.cross_entropy(y_t, labels)).backward()
    assert all(param.grad is None for param in classifier.head_source.parameters())
    assert all(param.grad is not None for param in classifier.backbone.parameters())


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_round_trips(name: str, way: str, bottleneck: bool) -> None:
    classifier, (x, _) = make(name, bottleneck=bottleneck), inputs()
    copied = COPIES[way](classifier)
    assert_same(copied(x), classifier(x))
    loaded = make(name, bottleneck=bottleneck, seed=1)
    loaded.load_state_dict(classifier.state_dict())
    assert_same(loaded(x), classifier(x))
    assert not {id(param) for param in copied.parameters()} & {id(param) for param in classifier.parameters()}
    assert copied.heads["source"] is copied.head_source
    assert all(each.dtype == torch.float64 for each in copied.double()(x.double()))


# ---------------------------------------------------------------------- recorded predictions


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(*inputs(), strict=True)


IN_ORDER: dict[str, Callable[[TensorDataset], Any]] = {
    "DataLoader": lambda data: DataLoader(data, 3),
    "one by one": lambda data: DataLoader(data, 1, shuffle=False),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, False)),
    "iterable data set": lambda _: DataLoader(Stream(), 3),
    "list": lambda data: [data[:4], data[4:]],
    "inputs alone": lambda data: [data[:4][0], data[4:][0]],
    "generator": lambda data: (data[i : i + 2] for i in range(0, 7, 2)),
}


@pytest.mark.parametrize("name", IN_ORDER)
def test_rows_belong_to_samples(name: str) -> None:
    classifier, (x, labels) = make(), inputs()
    recorded = record_logits(IN_ORDER[name](TensorDataset(x, labels)), classifier, "cpu")
    assert_close(recorded, classifier.predict_source(x).detach())
    assert not recorded.requires_grad


OUT_OF_ORDER: dict[str, Callable[[TensorDataset], Any]] = {
    "shuffle": lambda data: DataLoader(data, 3, shuffle=True),
    "subset": lambda data: DataLoader(data, 3, sampler=SubsetRandomSampler([4, 2])),
    "drop_last": lambda data: DataLoader(data, 3, drop_last=True),
    "random batches": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 2, False)),
    "own batches": lambda data: DataLoader(data, batch_sampler=[[5, 1], [2, 0]]),
    "no batches": lambda data: DataLoader(data, batch_size=None, shuffle=True),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_loaders_that_do_not_keep_the_order_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must yield every sample once, in the order of the data set"):
        record_logits(OUT_OF_ORDER[name](TensorDataset(*inputs())), make(), "cpu")


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="must yield at least one batch, got none"):
        record_logits([], make(), "cpu")


def test_plain_source_model_is_recorded() -> None:
    classifier, (x, _) = make(), inputs()
    model = nn.Sequential(classifier.backbone, classifier.pool_layer, classifier.head_source)
    assert_same(record_logits([x], model, "cpu"), record_logits([x], classifier, "cpu"))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Identity(), make()),  # in eval mode, that is the target head
        nn.Flatten(0),
        nn.Unflatten(1, (2, 2)),
        nn.LSTM(INPUTS, 2),
        nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, -1))),
    ],
)
def test_what_does_not_return_source_logits_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"`classifier` must map x to source logits \(b, N\), got"):
        record_logits([inputs(size=8)[0]], model, "cpu")


@pytest.mark.parametrize("fails", [False, True])
def test_recording_gives_every_part_its_mode_back(fails: bool) -> None:
    classifier = lwf.Classifier(Backbone(), 2, nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, NUM_SOURCE)))
    classifier.train().head_source.eval()
    classifier.backbone[2].eval()  # type: ignore[index]
    modes = [module.training for module in classifier.modules()]
    x = inputs()[0]
    if fails:
        with pytest.raises(RuntimeError):
            record_logits([x, x[:, :1]], classifier, "cpu")
    else:
        first, second = (record_logits([x], classifier.train(), "cpu") for _ in range(2))
        assert_same(first, second)  # no dropout
        classifier.head_source.eval()
        classifier.backbone[2].eval()  # type: ignore[index]
    assert [module.training for module in classifier.modules()] == modes


# ---------------------------------------------------------------------- with RotoGrad


def wrap(classifier: lwf.Classifier, **options: Any) -> RotoGradOptimizer:
    bare = torch.optim.SGD(classifier.get_parameters(0.1), momentum=0.9)
    return RotoGradOptimizer(bare, heads=classifier.heads, **{"rotate": [False, True]} | options)


def train_lwf(
    classifier: lwf.Classifier, optimizer: RotoGradOptimizer, recorded: Tensor, steps: int = 40
) -> list[dict[str, float]]:
    x, labels = inputs(size=32)

    def losses_of(batch: int) -> tuple[dict[str, Tensor], Tensor]:
        rep = classifier.represent(x)
        y_s, y_t = classifier.predict(rep)
        return {"source": distillation_loss(y_s, recorded, 3.0), "target": F.cross_entropy(y_t, labels)}, rep

    return train(optimizer, losses_of, steps)


def record(classifier: lwf.Classifier) -> Tensor:
    return record_logits([inputs(size=32)[0]], classifier, "cpu")


@pytest.mark.parametrize("bottleneck", [False, True])
def test_frozen_source_head_keeps_its_function(bottleneck: bool) -> None:
    classifier, (x, _) = make(bottleneck=bottleneck), inputs()
    before, rep = state(classifier), classifier.represent(x).detach()
    of_source, all_outputs = classifier.head_source(rep), [each.detach() for each in classifier(x)]
    optimizer = wrap(classifier, rotation_lr=0.1)
    assert_same([each.detach() for each in classifier(x)], all_outputs)  # the identity start
    history = train_lwf(classifier, optimizer, record(classifier))
    assert history[-1]["target"] < 0.9 * history[0]["target"]
    assert_same(classifier.head_source(rep), of_source)
    identity = torch.eye(FEATURES)
    assert_same(optimizer.rotations[0], identity)
    assert not torch.equal(optimizer.rotations[1], identity)
    for key, now in state(classifier).items():
        assert torch.equal(now, before[key]) == key.startswith("head_source")


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_heads_can_be_folded(name: str, bottleneck: bool) -> None:
    classifier, (x, _) = make(name, bottleneck=bottleneck), inputs()
    optimizer = wrap(classifier, rotate=True, init="haar")
    expected = [each.detach() for each in classifier(x)]
    optimizer.fold()
    assert_close([each.detach() for each in classifier(x)], expected)
    assert make(name, bottleneck=bottleneck).state_dict().keys() == classifier.state_dict().keys()


def test_evaluation_runs_the_rotated_target_head() -> None:
    classifier, (x, _) = make(), inputs()
    optimizer = wrap(classifier)
    train_lwf(classifier, optimizer, record(classifier), 3)
    y_t = classifier(x)[1]
    assert_same(classifier.eval()(x), y_t)


def test_resumed_run_is_the_uninterrupted_one() -> None:
    whole, first, resumed = make(), make(), make(seed=1)
    recorded = record(whole)
    train_lwf(whole, wrap(whole), recorded, 6)
    optimizer, other = wrap(first), wrap(resumed)
    train_lwf(first, optimizer, recorded, 3)
    resumed.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train_lwf(resumed, other, recorded, 3)
    assert_same(state(resumed), state(whole))


def pretrained(seed: int) -> tuple[lwf.Classifier, Tensor, Tensor]:
    """Return a classifier whose source head was trained, and data of another task on the same inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, INPUTS, generator=generator)
    source = (x @ torch.randn(INPUTS, NUM_SOURCE, generator=generator)).argmax(dim=1)
    target = (x.tanh() @ torch.randn(INPUTS, NUM_TARGET, generator=generator)).argmax(dim=1)
    classifier = co_tuning.Classifier(Backbone(), NUM_TARGET, nn.Linear(FEATURES, NUM_SOURCE))
    bare = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        bare.zero_grad()
        F.cross_entropy(classifier.predict_source(x), source).backward()  # type: ignore[no-untyped-call]
        bare.step()
    return lwf.Classifier(classifier.backbone, NUM_TARGET, classifier.head_source), x, target


@pytest.mark.parametrize("seed", range(5))
def test_distillation_that_starts_at_zero_does_not_stall_training(seed: int) -> None:
    """The common norm stays that of a task that trains, through the burn-in."""
    torch.manual_seed(seed)
    classifier, x, labels = pretrained(seed)
    recorded = record_logits([x], classifier, "cpu")
    optimizer = wrap(classifier)
    for _ in range(20):
        y_s, y_t = classifier(x)
        optimizer.zero_grad()
        optimizer.step([distillation_loss(y_s, recorded, 3.0), F.cross_entropy(y_t, labels)])
        assert optimizer.task_weights[1] > 0.1  # 0.2 to 0.5 with the plain mean of the norms, 0.003 to 0.02 in a stall
