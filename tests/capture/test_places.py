"""Places: evaluation rotates the same inputs as training, in any way to call the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import permutations
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
from tests.contract.models import assert_same
from tests.samplers import SEEDS

D = 6
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


def wrapped(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Linear, list[Any], RotoGradOptimizer]:
    backbone, heads = nn.Linear(5, D), [make(), make()]
    params = [*backbone.parameters(), *nn.ModuleList(heads).parameters()]
    options = {"init": "haar", "rotation_size": D, **options}
    return backbone, heads, RotoGradOptimizer(SGD(params, lr=0.1), heads, **options)


def step(optimizer: RotoGradOptimizer, outputs: Sequence[Tensor]) -> None:
    optimizer.zero_grad()
    optimizer.step([output.square().mean() for output in outputs])


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


SIZES = {"auxiliary": 4, "first": D, "second": D}


def pyramid(names: Sequence[str], **options: Any) -> tuple[dict[str, nn.Module], dict[str, nn.Module], Any]:
    backbones = {name: nn.Linear(5, SIZES[name]) for name in ("auxiliary", "first")}
    heads: dict[str, nn.Module] = {name: nn.Linear(SIZES[name], 2) for name in names}
    params = nn.ModuleList([*backbones.values(), *heads.values()]).parameters()
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), heads, rotation_lr=0.3, turn_every=1, **options)
    return {"auxiliary": backbones["auxiliary"], "first": backbones["first"]}, heads, optimizer


@pytest.mark.parametrize("names", list(permutations(SIZES)))
@pytest.mark.parametrize("init", ["identity", "haar"])
@pytest.mark.parametrize("evaluated", [False, True])
def test_rotations_have_the_size_that_most_tasks_read(names: tuple[str, ...], init: str, evaluated: bool) -> None:
    """Whichever head runs first."""
    backbones, heads, optimizer = pyramid(names, init=init)
    if evaluated:
        with torch.no_grad():
            for name in names:
                heads[name].eval()(torch.randn(4, SIZES[name]))
                heads[name].train()
    for _ in range(3):
        x = torch.randn(4, 5)
        z = {name: backbone(x) for name, backbone in backbones.items()}
        z["second"] = z["first"]
        step(optimizer, [heads[name](z[name]) for name in names])
    assert optimizer.rotations.size == D
    for task, name in enumerate(names):
        assert optimizer._core.engine.rotations.is_turned(task) == (name != "auxiliary" or init == "haar")
        head, z_new = heads[name].eval(), torch.randn(4, SIZES[name])
        expected = z_new if name == "auxiliary" else z_new @ optimizer.rotations[task].mT
        assert_close(head(z_new), head.forward(expected))


@pytest.mark.parametrize("init", ["identity", "haar"])
def test_gates_that_read_the_inputs_do_not_determine_the_size_of_the_rotations(init: str) -> None:
    """They run first, but their inputs have no gradient."""
    experts, gates, towers = (
        nn.Linear(5, 3 * D),
        [nn.Linear(5, 3) for _ in range(2)],
        [nn.Linear(D, 2) for _ in range(2)],
    )
    params = nn.ModuleList([experts, *gates, *towers]).parameters()
    heads = list(zip(towers, gates, strict=True))
    options: dict[str, Any] = {"init": init, "rotation_lr": 0.3, "turn_every": 1}
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), heads, **options)
    for _ in range(3):
        x = torch.randn(4, 5)
        z = [torch.einsum("bed,be->bd", experts(x).view(4, 3, D), gate(x).softmax(1)) for gate in gates]
        step(optimizer, [tower(each) for tower, each in zip(towers, z, strict=True)])
    x = torch.randn(4, 5)
    assert_same(gates[0](x), gates[0].forward(x))
    assert optimizer.rotations.size == D


def test_rotations_of_a_less_common_size_are_a_warning() -> None:
    names = tuple(SIZES)
    for flags in ([True, True, True], [False, True, True]):
        backbones, heads, optimizer = pyramid(names, rotate=flags)
        optimizer.step({"auxiliary": heads["auxiliary"](backbones["auxiliary"](torch.randn(4, 5))).square().mean()})
        z = backbones["first"](torch.randn(4, 5))
        heads["first"](z)
        message = (
            r"^The rotations should have the size that most heads read, got 4 .* and 2 heads that read 6 and .* Pass "
            r"`rotate` with one flag per task, False for the heads of another size\.$"
        )
        with pytest.warns(UserWarning, match=message) if flags[0] else nullcontext():
            heads["second"](z)
        assert optimizer.rotations.size == (4 if flags[0] else D)


def test_large_rotations_are_a_warning_and_disabled_ones_are_not_created(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rotoopt._capture.places.LARGE", D - 1)
    message = (
        rf"^Rotations should be small next to the network, got {D} features: each of 2 rotations has {D} x {D} "
        r"numbers\. Give rotation_size=512 to rotate the first ones only, or rotate=False\.$"
    )
    for options, size in (({}, D), ({"rotation_size": D - 1}, D - 1), ({"rotate": False}, None)):
        backbone, heads, optimizer = wrapped(lambda: nn.Linear(D, 2), **{"rotation_size": None, **options})
        with nullcontext() if options else pytest.warns(UserWarning, match=message) as warned:
            for _ in range(2):
                z = backbone(torch.randn(4, 5))
                step(optimizer, [head(z) for head in heads])
        assert warned is None or len(warned) == 1
        assert optimizer.rotations.size == size


def test_disabled_rotations_can_be_read_after_a_forward_pass() -> None:
    backbone, heads, optimizer = wrapped(lambda: nn.Linear(D, 2), rotation_size=None, rotate=False)
    heads[0](backbone(torch.randn(4, 5)))
    assert torch.equal(optimizer.rotations.matrices, torch.eye(D).expand(2, D, D))


class EarlyExit(nn.Module):
    """A classifier that gets all scales, and reads the last one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 2)

    def forward(self, scales: list[Tensor]) -> Tensor:
        return self.linear(scales[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("last", [[12], [12, 12]])
def test_early_exits_with_lists_of_scales_determine_the_size_before_the_last_one_that_reads_a_tensor_alone(
    last: list[int],
) -> None:
    """Two exits read 4 features, beside others; no warning says that the rotations have another size."""
    sizes = [[2, 4], [4, 8], last]
    backbones = [nn.ModuleList(nn.Linear(5, size) for size in each) for each in sizes]
    exits = nn.ModuleList(EarlyExit(each[-1]) for each in sizes)
    optimizer = RotoGradOptimizer(SGD(nn.ModuleList([*backbones, exits]).parameters(), lr=0.1), exits)
    for _ in range(3):
        x = torch.randn(4, 5)
        scales = [[layer(x) for layer in each] for each in backbones]
        step(optimizer, [leave(each) for leave, each in zip(exits, scales, strict=True)])
        assert optimizer.rotations.size == 4
