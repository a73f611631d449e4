"""The size of the rotations: that of the representation which most tasks read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from tests.capture.two_heads import D, step, wrapped
from tests.contract.models import assert_same

SIZES = {"auxiliary": 4, "first": D, "second": D}


def pyramid(names: Sequence[str], **options: Any) -> tuple[dict[str, nn.Module], dict[str, nn.Module], Any]:
    backbones = {name: nn.Linear(5, SIZES[name]) for name in ("auxiliary", "first")}
    heads: dict[str, nn.Module] = {name: nn.Linear(SIZES[name], 2) for name in names}
    params = nn.ModuleList([*backbones.values(), *heads.values()]).parameters()
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), heads, rotation_lr=0.3, turn_every=1, **options)
    return {"auxiliary": backbones["auxiliary"], "first": backbones["first"]}, heads, optimizer


@pytest.mark.parametrize("names", list(permutations(SIZES)))
@pytest.mark.parametrize("init", ["identity", "haar"])
@pytest.mark.parametrize("before", ["nothing", "an evaluation", "steps with a frozen backbone"])
@pytest.mark.filterwarnings("ignore:The representation should require grad")
def test_rotations_have_the_size_that_most_tasks_read(names: tuple[str, ...], init: str, before: str) -> None:
    """Whichever head runs first."""
    backbones, heads, optimizer = pyramid(names, init=init)
    if before == "an evaluation":
        with torch.no_grad():
            for name in names:
                heads[name].eval()(torch.randn(4, SIZES[name]))
                heads[name].train()
    elif before == "steps with a frozen backbone":
        step(optimizer, [heads[name](torch.randn(4, SIZES[name])) for name in names])
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


@pytest.mark.parametrize("options", [{}, {"rotation_optimizer": torch.optim.Adam}], ids=["built-in", "Adam"])
@pytest.mark.parametrize("sizes", [[4, 4, D, D, D], [D, D, 4, 4, 4], [4, D, D, 4, D]], ids=str)
def test_several_heads_may_read_each_size(sizes: list[int], options: dict[str, Any]) -> None:
    backbones, heads = {m: nn.Linear(5, m) for m in set(sizes)}, [nn.Linear(m, 2) for m in sizes]
    params = nn.ModuleList([*backbones.values(), *heads]).parameters()
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), heads, turn_every=1, **options)
    for _ in range(3):
        x = torch.randn(4, 5)
        z = {m: backbone(x) for m, backbone in backbones.items()}
        step(optimizer, [head(z[m]) for head, m in zip(heads, sizes, strict=True)])
    most = max(sizes, key=sizes.count)
    assert optimizer.rotations.size == most
    assert [optimizer._core.engine.rotations.is_turned(task) for task in range(5)] == [m == most for m in sizes]


@pytest.mark.parametrize("names", list(permutations(SIZES)))
@pytest.mark.filterwarnings("ignore:The representation should require grad")
def test_predictions_do_not_change_when_a_frozen_backbone_is_trained(names: tuple[str, ...]) -> None:
    """Heads keep the random rotations that they were trained with, whichever head ran first."""
    backbones, heads, optimizer = pyramid(names, init="haar")
    x = torch.randn(4, 5)

    def outputs() -> dict[str, Tensor]:
        z = {name: backbone(x) for name, backbone in backbones.items()}
        return {name: heads[name](z[min(name, "first")]) for name in names}

    nn.ModuleDict(backbones).requires_grad_(False)
    for _ in range(2):
        step(optimizer, list(outputs().values()))
    before = outputs()
    nn.ModuleDict(backbones).requires_grad_(True)
    assert_close(outputs(), before)
    assert_close(outputs(), before)
    assert optimizer.rotations.size == D


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


def test_a_head_that_ran_before_the_size_was_determined_is_rotated_after_the_first_step() -> None:
    """Its rotation was updated in that step: evaluation after it computes what training does."""
    backbone, first, second = nn.Linear(5, D), nn.Bilinear(D, D, 2), nn.Linear(D, 2)
    params = nn.ModuleList([backbone, first, second]).parameters()
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), [first, second], rotation_lr=0.3, turn_every=1)
    x = torch.randn(4, 5)
    z = backbone(x)
    step(optimizer, [first(z, z), second(z)])
    with torch.no_grad():
        z = backbone(x)
        rotated = z @ optimizer.rotations[0].mT
        assert not torch.allclose(rotated, z)
        assert_close(first.eval()(z, z), first.forward(rotated, rotated))
    assert_close(first.train()(backbone(x), backbone(x)), first.forward(rotated, rotated))


def test_a_tensor_that_entered_twice_before_the_size_was_determined_is_rotated_in_both_places() -> None:
    backbone, first, second = nn.Linear(5, D), nn.Bilinear(D, D, 2), nn.Linear(D, 2)
    params = nn.ModuleList([backbone, first, second]).parameters()
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), [first, second], rotation_lr=0.3, turn_every=1)
    z = backbone(torch.randn(4, 5))
    step(optimizer, [first(z, z), second(z)])
    with torch.no_grad():
        R, others = optimizer.rotations[0], (z, z + 1)
        assert not torch.allclose(z @ R.mT, z)
        assert_close(first.eval()(*others), first.forward(*(other @ R.mT for other in others)))


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
