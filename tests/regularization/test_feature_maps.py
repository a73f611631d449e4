"""Distances of feature maps: equal to sums in plain Python, by name in any order, and never broadcast."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from rotoopt.regularization import AttentionBehavioralRegularization, BehavioralRegularization
from tests.asserts import eps
from tests.contract.models import assert_same
from tests.regularization import oracle
from tests.samplers import DTYPES, SEEDS, Sampler

Maps = dict[str, Tensor]
# Shapes of feature maps with the dimension of their channels: vectors, tokens, maps, volumes.
LAYOUTS = st.sampled_from([((3, 5), 1), ((2, 4, 3), -1), ((2, 4, 3), 1), ((3, 4, 2, 3), 1), ((2, 3, 2, 2, 2), 1)])
NAMES = ["layer4.2.conv3", "layer1.2.conv3", "conv", "layer1"]


class Case:
    """Feature maps and attention of four layers, whose shapes have one layout and different sizes."""

    def __init__(self, layout: tuple[tuple[int, ...], int], seed: int, dtype: torch.dtype = torch.float64) -> None:
        sampler = Sampler(seed, dtype)
        (batch, *sizes), self.channel_dim = layout
        shapes = {name: (batch, *(size + extra for size in sizes)) for extra, name in enumerate(NAMES)}
        self.source: Maps = {name: sampler.normal(*shape) for name, shape in shapes.items()}
        self.target: Maps = {name: sampler.normal(*shape).requires_grad_() for name, shape in shapes.items()}
        self.attention: Maps = {
            name: sampler.normal(shape[self.channel_dim]).softmax(0) for name, shape in shapes.items()
        }

    def with_attention(self, **options: Any) -> AttentionBehavioralRegularization:
        return AttentionBehavioralRegularization(self.attention, channel_dim=self.channel_dim, **options)

    def gradients(self, penalty: Tensor) -> Maps:
        grads = torch.autograd.grad(penalty, list(self.target.values()))
        return dict(zip(self.target, grads, strict=True))


def shuffled(maps: Maps, seed: int) -> Maps:
    names = [*maps]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return {names[i]: maps[names[i]] for i in order}


@given(layout=LAYOUTS, seed=SEEDS, dtype=DTYPES)
def test_behavioral_equals_the_oracle(layout: Any, seed: int, dtype: torch.dtype) -> None:
    case = Case(layout, seed, dtype)
    penalty = BehavioralRegularization()(case.source, case.target)
    expected = torch.tensor(oracle.behavioral(case.source, case.target), dtype=dtype)
    assert_close(penalty, expected, rtol=20 * eps(dtype), atol=0.0)
    assert_same(case.gradients(penalty), {name: case.target[name].detach() - case.source[name] for name in NAMES})


@given(layout=LAYOUTS, seed=SEEDS, dtype=DTYPES)
def test_attention_equals_the_oracle(layout: Any, seed: int, dtype: torch.dtype) -> None:
    case = Case(layout, seed, dtype)
    penalty = case.with_attention()(case.source, case.target)
    expected = oracle.attention_behavioral(case.source, case.target, case.attention, case.channel_dim)
    assert_close(penalty, torch.tensor(expected, dtype=dtype), rtol=20 * eps(dtype), atol=0.0)
    for name, grad in case.gradients(penalty).items():
        difference = (case.target[name].detach() - case.source[name]).movedim(case.channel_dim, -1)
        c, num_positions = difference.shape[-1], math.prod(difference.shape[1:-1])
        weighted = (difference * case.attention[name] * c / num_positions).movedim(-1, case.channel_dim)
        assert_close(grad, weighted, rtol=20 * eps(dtype), atol=0.0)


@given(layout=LAYOUTS, seed=SEEDS)
def test_uniform_attention_is_the_mean_over_positions(layout: Any, seed: int) -> None:
    case = Case(layout, seed)
    penalty = 0.0
    for name, uniform in case.attention.items():
        source, target = {name: case.source[name]}, {name: case.target[name]}
        num_positions = source[name][0].numel() // len(uniform)
        penalty += BehavioralRegularization()(source, target).item() / num_positions
        case.attention[name] = torch.full_like(uniform, 1 / len(uniform))
    assert case.with_attention()(case.source, case.target).item() == pytest.approx(penalty, rel=1e-13)


@given(layout=LAYOUTS, seed=SEEDS)
def test_order_of_layers_does_not_matter(layout: Any, seed: int) -> None:
    case = Case(layout, seed)
    source, target = shuffled(case.source, seed), shuffled(case.target, seed + 1)
    case.attention = shuffled(case.attention, seed + 2)
    for penalty in (BehavioralRegularization(), case.with_attention()):
        assert_close(penalty(source, target), penalty(case.source, case.target), rtol=1e-14, atol=0.0)


@given(layout=LAYOUTS, seed=SEEDS)
def test_sequence_of_attentions_is_in_the_order_of_the_source(layout: Any, seed: int) -> None:
    case = Case(layout, seed)
    by_name = case.with_attention()(case.source, case.target)
    source = shuffled(case.source, seed)
    listed = AttentionBehavioralRegularization([case.attention[name] for name in source], channel_dim=case.channel_dim)
    assert_close(listed(source, shuffled(case.target, seed + 1)), by_name, rtol=1e-14, atol=0.0)


@given(layout=LAYOUTS, seed=SEEDS)
def test_permuted_samples_channels_and_positions(layout: Any, seed: int) -> None:
    """The same permutation of source, target and attention only changes the order of summation."""
    case = Case(layout, seed)
    penalties = BehavioralRegularization(), case.with_attention()
    expected = [penalty(case.source, case.target) for penalty in penalties]
    for name, each in case.source.items():
        for dim, size in enumerate(each.shape):
            order = torch.randperm(size)
            for maps in (case.source, case.target):
                maps[name] = maps[name].detach().index_select(dim, order)
            if dim == case.channel_dim % each.ndim:
                case.attention[name] = case.attention[name][order]
    permuted = [penalty(case.source, case.target) for penalty in (penalties[0], case.with_attention())]
    assert_close(permuted, [each.detach() for each in expected], rtol=1e-13, atol=0.0)


@given(layout=LAYOUTS, seed=SEEDS)
def test_batchmean_is_the_sum_over_the_batch_size(layout: Any, seed: int) -> None:
    case = Case(layout, seed)
    batch = len(case.source["conv"])
    for kind in (BehavioralRegularization, case.with_attention):
        sums, means = (kind(reduction=reduction)(case.source, case.target) for reduction in ("sum", "batchmean"))
        assert_close(means * batch, sums, rtol=1e-14, atol=0.0)
        repeated = [
            {name: each.repeat(3, *[1] * (each.ndim - 1)) for name, each in maps.items()}
            for maps in (case.source, case.target)
        ]
        assert_close(kind(reduction="batchmean")(*repeated), means, rtol=1e-14, atol=0.0)


@given(layout=LAYOUTS, seed=SEEDS)
def test_equal_maps_have_no_penalty_and_no_gradient(layout: Any, seed: int) -> None:
    case = Case(layout, seed)
    source = {name: each.detach().clone() for name, each in case.target.items()}
    for penalty in (BehavioralRegularization()(source, case.target), case.with_attention()(source, case.target)):
        assert penalty.item() == 0.0
        assert not any(grad.any() for grad in case.gradients(penalty).values())


@pytest.mark.parametrize("at_zero", [True, False])
@pytest.mark.parametrize("kind", ["behavioral", "attention"])
def test_first_and_second_derivatives(kind: str, at_zero: bool) -> None:
    case = Case(((2, 2, 2), 1), 0)
    penalty = BehavioralRegularization() if kind == "behavioral" else case.with_attention()
    source = {name: each.detach().clone() for name, each in case.target.items()} if at_zero else case.source

    def value(*targets: Tensor) -> Tensor:
        result: Tensor = penalty(source, dict(zip(source, targets, strict=True)))
        return result

    assert torch.autograd.gradcheck(value, tuple(case.target.values()))
    assert torch.autograd.gradgradcheck(value, tuple(case.target.values()))


def test_source_gets_no_gradient() -> None:
    case = Case(((2, 3), 1), 0)
    for each in case.source.values():
        each.requires_grad_()
    for penalty in (BehavioralRegularization(), case.with_attention()):
        penalty(case.source, case.target).backward()
    assert all(each.grad is None for each in case.source.values())
    assert all(each.grad is not None for each in case.target.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["behavioral", "attention"])
def test_half_precision_is_summed_in_float32(kind: str, dtype: torch.dtype) -> None:
    """300^2 overflows in float16."""
    source, target = {"conv": torch.zeros(2, 4, 8, 8, dtype=dtype)}, {"conv": torch.full((2, 4, 8, 8), 300.0).to(dtype)}
    target["conv"].requires_grad_()
    attention = {"conv": torch.full((4,), 0.25).to(dtype)}
    penalty = BehavioralRegularization() if kind == "behavioral" else AttentionBehavioralRegularization(attention)
    value = penalty(source, target)
    positions = 1 if kind == "behavioral" else 64
    assert_same(value, torch.tensor(0.5 * 300.0**2 * 2 * 4 * 64 / positions))
    value.backward()
    assert target["conv"].grad is not None
    assert (target["conv"].grad == torch.tensor(300.0 / positions).to(dtype)).all()


@pytest.mark.parametrize("kind", ["behavioral", "attention"])
def test_autocast_changes_nothing(kind: str) -> None:
    case = Case(((8, 16, 5, 5), 1), 0, torch.float32)
    penalty = BehavioralRegularization() if kind == "behavioral" else case.with_attention()
    expected = penalty(case.source, case.target)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(penalty(case.source, case.target), expected)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda penalty: pickle.loads(pickle.dumps(penalty)),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("kind", ["behavioral", "attention", "sequence"])
def test_copies_compute_the_same(kind: str, name: str) -> None:
    case = Case(((2, 4, 3), -1), 0)
    penalty: nn.Module = BehavioralRegularization(reduction="batchmean")
    if kind == "attention":
        penalty = case.with_attention(reduction="batchmean")
    if kind == "sequence":
        penalty = AttentionBehavioralRegularization(list(case.attention.values()), channel_dim=-1)
    copied = COPIES[name](penalty)
    assert_same(copied(case.source, case.target), penalty(case.source, case.target))
    for buffer in copied.buffers():
        buffer.zero_()
    assert penalty(case.source, case.target).item() > 0.0


def test_attention_is_a_copy_in_the_state_dict_and_moves() -> None:
    case = Case(((2, 3, 4), 1), 0)
    penalty, other = case.with_attention(), Case(((2, 3, 4), 1), 1).with_attention()
    expected = penalty(case.source, case.target)
    for weights in case.attention.values():
        weights.zero_()
    assert_same(penalty(case.source, case.target), expected)
    other.load_state_dict(penalty.state_dict())
    assert_same(other(case.source, case.target), expected)
    assert list(penalty.state_dict()) == [f"channel_attention.{name.replace('.', '/')}" for name in NAMES]
    penalty.to("meta", torch.float32)
    assert {(each.device.type, each.dtype) for each in penalty.buffers()} == {("meta", torch.float32)}
    assert list(penalty.parameters()) == []


A, B = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
WEIGHTS = torch.full((3,), 1 / 3)
SAME = "must be those of the same layers, at least one, got those of"
SHAPE = r"must have the same shape, with at least one dimension, got \(2, 3, 4, 4\) for the source and"
CHANNELS = r"and along channel_dim={} as many channels as there are weights, {}, got \(2, 3, 4, 4\) for conv"
BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "nothing": (ValueError, rf"{SAME} \[\] for the source and", lambda: BehavioralRegularization()({}, {})),
    "less in the target": (
        ValueError,
        rf"{SAME} \['a', 'b'\] for the source and of \['a'\] for the target",
        lambda: BehavioralRegularization()({"a": A, "b": A}, {"a": A}),
    ),
    "less in the source": (ValueError, SAME, lambda: BehavioralRegularization()({"a": A}, {"a": A, "b": A})),
    "other names": (ValueError, SAME, lambda: AttentionBehavioralRegularization([WEIGHTS])({"a": A}, {"b": A})),
    "broadcastable": (
        ValueError,
        rf"{SHAPE} \(2, 1, 4, 4\) for the target in conv",
        lambda: BehavioralRegularization()({"conv": A}, {"conv": B}),
    ),
    "another batch": (
        ValueError,
        rf"{SHAPE} \(1, 3, 4, 4\)",
        lambda: AttentionBehavioralRegularization([WEIGHTS])({"conv": A}, {"conv": A[:1]}),
    ),
    "scalars": (
        ValueError,
        "at least one dimension",
        lambda: BehavioralRegularization()({"a": A.sum()}, {"a": A.sum()}),
    ),
    "with the output": (
        TypeError,
        "^Feature maps must be a mapping from names of layers to tensors, got a tuple. IntermediateLayerGetter returns "
        "two things: the feature maps, and the output of the model",
        lambda: BehavioralRegularization()(({"a": A}, A), ({"a": A}, A)),
    ),
    "tensors": (TypeError, "must be a mapping .*, got a Tensor", lambda: BehavioralRegularization()(A, A)),
    "tuples of tensors": (
        TypeError,
        "must be a mapping .*, got a Tensor and a tuple",
        lambda: BehavioralRegularization()({"conv": A, "lstm": (A, A)}, {"conv": A, "lstm": (A, A)}),
    ),
    "attention of one channel": (
        ValueError,
        CHANNELS.format(1, 1),
        lambda: AttentionBehavioralRegularization({"conv": torch.ones(1)})({"conv": A}, {"conv": A}),
    ),
    "attention along positions": (
        ValueError,
        CHANNELS.format(-1, 3),
        lambda: AttentionBehavioralRegularization({"conv": WEIGHTS}, channel_dim=-1)({"conv": A}, {"conv": A}),
    ),
    "attention along samples": (
        ValueError,
        CHANNELS.format(-4, 2),
        lambda: AttentionBehavioralRegularization({"conv": torch.ones(2)}, channel_dim=-4)({"conv": A}, {"conv": A}),
    ),
    "no such dimension": (
        ValueError,
        CHANNELS.format(4, 3),
        lambda: AttentionBehavioralRegularization({"conv": WEIGHTS}, channel_dim=4)({"conv": A}, {"conv": A}),
    ),
    "dimension beyond": (
        ValueError,
        CHANNELS.format(5, 3),
        lambda: AttentionBehavioralRegularization({"conv": WEIGHTS}, channel_dim=5)({"conv": A}, {"conv": A}),
    ),
    "attention of other layers": (
        ValueError,
        r"must be those of the layers with attention, \['a'\], got those of \['conv'\]",
        lambda: AttentionBehavioralRegularization({"a": WEIGHTS})({"conv": A}, {"conv": A}),
    ),
    "more attentions": (
        ValueError,
        r"must be as many as there are attentions, 2, got those of \['conv'\]",
        lambda: AttentionBehavioralRegularization([WEIGHTS, WEIGHTS])({"conv": A}, {"conv": A}),
    ),
    "no attention": (
        ValueError,
        r"^`channel_attention` must have weights for at least one layer, got none\.$",
        lambda: AttentionBehavioralRegularization([]),
    ),
    "attention as a matrix": (
        ValueError,
        r"must have one weight per channel, got shape \(1, 3\) for conv",
        lambda: AttentionBehavioralRegularization({"conv": WEIGHTS[None]}),
    ),
    "attention without channels": (
        ValueError,
        r"got shape \(0,\) for 0",
        lambda: AttentionBehavioralRegularization([torch.ones(0)]),
    ),
    "attention as numbers": (
        TypeError,
        "`channel_attention` must contain floating-point tensors, got a list for 0",
        lambda: AttentionBehavioralRegularization([[0.5, 0.5]]),  # type: ignore[list-item]
    ),
    "attention in integers": (
        TypeError,
        "got torch.int64 for conv",
        lambda: AttentionBehavioralRegularization({"conv": torch.ones(3, dtype=torch.int64)}),
    ),
    "reduction": (
        ValueError,
        "`reduction` must be 'sum' or 'batchmean', got 'mean'",
        lambda: BehavioralRegularization(reduction="mean"),  # type: ignore[arg-type]
    ),
    "reduction with attention": (
        ValueError,
        "`reduction` must be",
        lambda: AttentionBehavioralRegularization([WEIGHTS], reduction=None),  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mismatches_are_rejected(name: str) -> None:
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call()
