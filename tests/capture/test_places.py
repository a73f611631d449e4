"""Places: evaluation rotates the same inputs as training, in any way to call the head."""

from __future__ import annotations

from collections.abc import Callable
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
from rotoopt._capture.paths import Arguments, Path, siblings
from tests.capture.two_heads import D, step, wrapped
from tests.contract.models import assert_same
from tests.samplers import SEEDS

Features = Any  # a list or dict of tensors


def entries(features: Features) -> list[Tensor]:
    return list(features.values()) if isinstance(features, dict) else list(features)


class Each(nn.Module):
    """Applies one layer to each of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, 2)

    def forward(self, features: Features) -> Tensor:
        return torch.stack([self.out(each).mean(0) for each in entries(features)])


class Positional(Each):
    """The same for arguments that have no names."""

    def forward(self, *features: Tensor) -> Tensor:
        return super().forward(features)


def in_list(features: list[Tensor]) -> Features:
    return features


def in_dict(features: list[Tensor]) -> Features:
    return {f"camera {i}": each for i, each in enumerate(features)}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("into", [in_list, tuple, in_dict])
@given(trained=st.integers(1, 4), evaluated=st.integers(1, 6), seed=SEEDS)
def test_lists_and_dicts_may_be_longer_or_shorter_than_in_training(
    into: Callable[[list[Tensor]], Features], folded: bool, trained: int, evaluated: int, seed: int
) -> None:
    torch.manual_seed(seed)
    backbone, heads, optimizer = wrapped(Each)
    features = into([backbone(torch.randn(4, 5)) for _ in range(trained)])
    step(optimizer, [head(features) for head in heads])
    nn.ModuleList(heads).eval()
    others = [torch.randn(4, D) for _ in range(evaluated)]
    expected = [
        torch.stack([head.out(each @ R.mT).mean(0) for each in others])
        for head, R in zip(heads, optimizer.rotations.matrices.clone(), strict=True)
    ]
    if folded:
        with pytest.warns(UserWarning, match="They keep their rotations"):
            optimizer.fold()
    assert_close([head(into(others)) for head in heads], expected)


@given(trained=st.integers(1, 3), evaluated=st.integers(1, 4), seed=SEEDS)
def test_arguments_without_names_may_be_more_or_fewer_than_in_training(trained: int, evaluated: int, seed: int) -> None:
    torch.manual_seed(seed)
    backbone, heads, optimizer = wrapped(Positional)
    features = [backbone(torch.randn(4, 5)) for _ in range(trained)]
    step(optimizer, [head(*features) for head in heads])
    nn.ModuleList(heads).eval()
    others = [torch.randn(4, D) for _ in range(evaluated)]
    for head, R in zip(heads, optimizer.rotations.matrices, strict=True):
        assert_close(head(*others), torch.stack([head.out(each @ R.mT).mean(0) for each in others]))


def test_in_samples_that_are_dicts_keys_decide_what_is_rotated() -> None:
    """In a list of dicts, positions do not matter, keys do."""
    sizes = {"image": D, "shape": 3}
    made = {name: nn.Linear(5, size) for name, size in sizes.items()}

    class Head(Each):
        def forward(self, features: list[dict[str, Tensor]]) -> Tensor:
            parts = [self.out(each["image"]).mean(0) * each["shape"].sum() for each in features]
            return torch.stack(parts)

    _, heads, optimizer = wrapped(Head)

    def samples(number: int) -> list[dict[str, Tensor]]:
        return [{name: layer(torch.randn(4, 5)) for name, layer in made.items()} for _ in range(number)]

    features = samples(2)
    step(optimizer, [head(features) for head in heads])
    heads[0].eval()
    others = samples(5)
    turned = [{**each, "image": each["image"] @ optimizer.rotations[0].mT} for each in others]
    assert_close(heads[0](others), heads[0].forward(turned))


def test_ambiguous_entries_are_rejected() -> None:
    backbone, heads, optimizer = wrapped(Each)
    features = [backbone(torch.randn(4, 5)), torch.randn(4, D)]
    for _ in range(2):
        z = [backbone(torch.randn(4, 5)), features[1]]
        step(optimizer, [head(z) for head in heads])
    heads[0].eval()
    with torch.no_grad():
        heads[0](features)
        heads[0](features[:1])
        message = r"A list or dict of inputs must have the same entries as in training.*got argument 0\[2\], which"
        with pytest.raises(ValueError, match=message):
            heads[0]([*features, features[0]])


class HandsOn(nn.Module):
    """Passes all its arguments on to another module."""

    def forward(self, *args: Any, **kwargs: Any) -> None: ...


def test_arguments_that_are_passed_on_are_those_of_another_module() -> None:
    handed_on, own = Arguments.of(HandsOn()), Arguments.of(Positional())
    assert [handed_on.by_position(1), handed_on.by_keyword("z")] == [("1",), ("z",)]
    assert [own.by_position(0), own.by_position(1), own.by_keyword("z")] == [("*", 0), ("*", 1), ("**", "z")]


def test_siblings_are_other_entries_of_one_argument() -> None:
    others: list[Path] = [("0", 0, "a"), ("0", 0, "b"), ("0", "c", "a"), ("0", 1), ("0",), ("1", 1, "a")]
    assert siblings(("0", 1, "a"), others) == [("0", 0, "a")]
    assert siblings(("0", 2), others) == [("0", 1)]
    assert siblings(("0", "x", "y"), others) == others[:3]
    assert siblings(("2",), others) == siblings(("1", 1), others) == []


class Decoder(nn.Module):
    """Reads two tensors of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2 * D, 2)

    def forward(self, target: Tensor, memory: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * F.linear(torch.cat([target, memory], 1), self.out.weight)


def test_arguments_are_the_same_by_position_and_by_keyword() -> None:
    backbone, heads, optimizer = wrapped(Decoder)
    calls: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
        lambda head, t, m: head(t, memory=m),
        lambda head, t, m: head(t, m),
        lambda head, t, m: head(memory=m, target=t, scale=1.0),
    ]
    x = torch.randn(4, 5)
    for trained in calls:
        step(optimizer, [trained(head, backbone(x), backbone(2 * x)) for head in heads])
        nn.ModuleList(heads).eval()
        target, memory = backbone(x).detach(), backbone(2 * x).detach()
        R = optimizer.rotations[0]
        expected = heads[0].forward(target @ R.mT, memory @ R.mT)
        assert_same([call(heads[0], target, memory) for call in calls], [expected] * len(calls))
        nn.ModuleList(heads).train()


def test_the_first_step_creates_the_rotations_if_no_head_gets_the_representation_alone() -> None:
    backbone, heads, optimizer = wrapped(Decoder, init="identity", rotation_size=None)
    for made in (None, D):
        assert optimizer.rotations.size == made
        z = backbone(torch.randn(4, 5))
        step(optimizer, [head(z, z + 1) for head in heads])


class OneOrTwo(nn.Module):
    """Reads a list of two tensors, or one of them several times."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, 2)

    def forward(self, z: Tensor | list[Tensor], times: int = 1) -> Tensor:
        out: Tensor = self.out(times * z if isinstance(z, Tensor) else z[0] + z[1])
        return out


@pytest.mark.parametrize("several", ["in training", "in evaluation"])
def test_another_way_to_call_is_rejected_if_several_inputs_are_rotated(several: str) -> None:
    backbone, heads, optimizer = wrapped(OneOrTwo)
    z = backbone(torch.randn(4, 5))
    both = [z, backbone(torch.randn(4, 5))]
    step(optimizer, [head(both if several == "in training" else z) for head in heads])
    message = (
        r"^The inputs of a head in evaluation must correspond to those in training, got tensors in other arguments, or "
        r"more of them\. It is ambiguous which is rotated\.$"
    )
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        heads[0].eval()(both if several == "in evaluation" else z, 2)


@pytest.mark.parametrize("init", ["identity", "haar"])
@pytest.mark.parametrize("resumed", [False, True])
def test_an_input_that_gets_a_gradient_later_does_not_change_predictions(init: str, resumed: bool) -> None:
    """Gradual unfreezing: it stays unrotated if the rotations have been updated."""
    options: dict[str, Any] = {"init": init, "rotation_size": D, "rotation_lr": 0.3, "turn_every": 1}
    backbone, heads, optimizer = wrapped(Decoder, **options)
    frozen = nn.Linear(5, D).requires_grad_(False)

    def outputs(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        x = torch.randn(4, 5)
        z, other = backbone(x), frozen(x)
        return [head(z, other) for head in heads]

    for i in range(3):
        step(optimizer, outputs(i))
    if resumed:
        state = optimizer.state_dict()
        optimizer.remove()
        params = optimizer.param_groups[0]["params"]
        optimizer = RotoGradOptimizer(SGD(params, lr=0.1), heads, **options)
        optimizer.load_state_dict(state)
    assert optimizer._core.engine.rotations.is_turned(0)
    before = outputs(0)
    frozen.requires_grad_(True)
    for _ in range(2):
        assert_same(outputs(0), before)
    optimizer.backward([output.square().mean() for output in outputs(0)])
    assert frozen.weight.grad is not None
    nn.ModuleList(heads).eval()
    assert_same(outputs(0), before)


def test_an_input_that_gets_a_gradient_before_the_first_update_is_rotated() -> None:
    backbone, heads, optimizer = wrapped(Decoder, init="identity", rotation_lr=0.0)
    frozen, x = nn.Linear(5, D).requires_grad_(False), torch.randn(4, 5)
    for _ in range(2):
        step(optimizer, [head(backbone(x), frozen(x)) for head in heads])
        frozen.requires_grad_(True)
    R = optimizer.rotations[0]
    R.copy_(R.roll(1, 0))
    expected = heads[0].forward(backbone(x) @ R.mT, frozen(x) @ R.mT)
    assert_same(heads[0](backbone(x), frozen(x)), expected)
