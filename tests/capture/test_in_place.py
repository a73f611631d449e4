"""Heads that change their input in place get a copy, and only these."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from rotoopt import RotoGradOptimizer


@pytest.mark.parametrize("rotate", [True, False])
def test_heads_may_begin_with_an_in_place_layer(rotate: bool) -> None:
    """If R = I, the head gets z itself, and changing z would change the inputs of the other heads."""
    backbone, heads = nn.Linear(3, 4), [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 1)) for _ in range(2)]
    bare = torch.optim.SGD([*backbone.parameters(), *heads[0].parameters(), *heads[1].parameters()], lr=0.1)
    optimizer = RotoGradOptimizer(bare, heads=heads, rotate=rotate)
    rep = backbone(torch.randn(5, 3))
    before = rep.detach().clone()
    for _ in range(3):
        optimizer.step([head(rep).square().mean() for head in heads], rep)
        assert torch.equal(rep.detach(), before)
        with torch.no_grad():
            heads[0](rep)
        assert torch.equal(rep.detach(), before)
        rep = backbone(torch.randn(5, 3))
        before = rep.detach().clone()


class Looks(nn.Module):
    """A head that notes the address of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, z: Tensor, *_: object) -> Tensor:
        self.seen.append(z.data_ptr())
        return z.square()


@pytest.mark.parametrize("others", [(), (1,)], ids=["z", "z and a number"])
@pytest.mark.parametrize("trains", [True, False], ids=["training", "evaluation"])
def test_a_head_that_does_not_change_its_input_gets_a_copy_only_until_this_is_known(
    trains: bool, others: tuple[int, ...]
) -> None:
    heads = [Looks(), Looks()]
    optimizer = RotoGradOptimizer(SGD([nn.Parameter(torch.zeros(4))], lr=0.1), heads, rotate=False)
    reps = [torch.randn(5, 4, requires_grad=True) for _ in range(3)]
    for step, rep in enumerate(reps):
        if trains or step < 2:
            optimizer.step([head(rep, *others).sum() for head in heads])
        else:
            _ = [head.eval()(rep, *others) for head in heads]
    for head in heads:
        assert [seen == rep.data_ptr() for seen, rep in zip(head.seen, reps, strict=True)] == [False, True, True]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_finds_out_anew_whether_a_head_changes_its_input(copied: Callable[[Any], Any]) -> None:
    """The tensors in the copy have other version counters."""
    heads, bare = nn.ModuleList([Looks(), Looks()]), SGD([nn.Parameter(torch.zeros(4))], lr=0.1)
    optimizer = RotoGradOptimizer(bare, heads, rotate=False)
    reps = [torch.randn(5, 4, requires_grad=True) for _ in range(3)]
    optimizer.step([head(reps[0]).sum() for head in heads])
    optimizer, heads = copied((optimizer, heads))
    for rep in reps[1:]:
        optimizer.step([head(rep).sum() for head in heads])
    for head in heads:
        assert [seen == rep.data_ptr() for seen, rep in zip(head.seen, reps, strict=True)] == [False, False, True]


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda z: z[:, 1:],
    "transposed": lambda z: z.transpose(1, 2),
    "expanded": lambda z: z[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_a_head_evaluates_a_tensor_of_the_same_strides_before_training(view: Callable[[Tensor], Tensor]) -> None:
    """Layers choose their operations by strides, so predictions would change by rounding."""
    rep, seen = view(torch.randn(4, 5, 5)), []
    heads = [nn.Linear(5, 2).eval(), nn.Linear(5, 2).eval()]
    for head in heads:
        head.register_forward_hook(lambda _, args, __: seen.append(args[0].stride()))
    before = [head(rep) for head in heads]
    RotoGradOptimizer(SGD([nn.Parameter(torch.zeros(4))], lr=0.1), heads, rotate=False)
    after = [head(rep) for head in heads]
    assert set(seen) == {rep.stride()}
    assert all(map(torch.equal, before, after))
