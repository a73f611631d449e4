"""Representations of other kinds: subclasses of tensors, with attributes, parameters, transposed ones."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from rotoopt import ProgressWeighting, RotoGradOptimizer, RotoGradWeighting
from rotoopt._capture.inputs import leaves_of
from tests.contract.models import REP_SIZE, TwoTasks


class Meta(Tensor):
    """A tensor subclass like ``MetaTensor`` of MONAI."""


class Masked(nn.Module):
    """Reads an attribute of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 2)

    def forward(self, z: Any) -> Tensor:
        out: Tensor = self.out(z) * z.mask
        return out


@pytest.mark.parametrize("kind", [Tensor, Meta])
@pytest.mark.parametrize("options", [{"rotate": False}, {"init": "haar"}, {"normalize_losses": True}])
def test_tensors_that_enter_a_head_keep_their_class_and_attributes(kind: type[Tensor], options: dict[str, Any]) -> None:
    backbone, heads = nn.Linear(5, 6), nn.ModuleList([Masked(), Masked()])
    params = [*backbone.parameters(), *heads.parameters()]
    optimizer = RotoGradOptimizer(SGD(params, lr=0.1), heads, turn_every=2, **options)
    mask = torch.tensor([[1.0], [0.0], [1.0], [0.0]])

    def outputs() -> list[Any]:
        z: Any = backbone(torch.randn(4, 5)).as_subclass(kind)
        z.mask = mask
        return [head(z) for head in heads]

    for _ in range(3):
        optimizer.zero_grad()
        for output in (found := outputs()):
            assert type(output) is kind
            assert torch.equal(output == 0, mask.expand(4, 2) == 0)
        optimizer.step([output.square().mean() for output in found])
    record = optimizer.last_step
    assert record is not None
    tensors = [each for each in vars(record).values() if isinstance(each, Tensor)]
    assert {type(each) for each in [*tensors, *leaves_of(optimizer.state_dict())] if isinstance(each, Tensor)} == {
        Tensor
    }
    assert copy.deepcopy(optimizer.state_dict())
    heads.eval()
    assert all(torch.equal(output == 0, mask.expand(4, 2) == 0) for output in outputs())


class Parameter(nn.Module):
    """A representation that is a parameter, as the factors of users: the same tensor in every forward pass."""

    def __init__(self, *, copies: bool) -> None:
        super().__init__()
        self.rep = nn.Parameter(torch.randn(5, REP_SIZE, generator=torch.Generator().manual_seed(0)))
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        return self.rep.clone() if self.copies else self.rep


@pytest.mark.parametrize("trial", [False, True])
@pytest.mark.parametrize("weighting", [ProgressWeighting, RotoGradWeighting])
def test_a_parameter_as_representation_is_measured_anew_in_every_step(weighting: type, trial: bool) -> None:
    """Like a copy of it, which is another tensor in every step; also after a forward pass that is not used."""
    runs = []
    for copies in (False, True):
        torch.manual_seed(1)
        model = TwoTasks()
        factors = Parameter(copies=copies)
        model.backbone = nn.Sequential(factors)
        optimizer = RotoGradOptimizer(SGD(model.parameters(), lr=0.1), model.heads, weighting=weighting(), turn_every=2)
        for step in range(8):
            if trial:
                model.losses(step)
                with torch.no_grad():
                    factors.rep.mul_(1.1)
            optimizer.zero_grad()
            optimizer.step(model.losses(step)[0])
        assert optimizer.last_step is not None
        runs.append([*model.parameters(), optimizer.rotations.matrices, optimizer.last_step.weights])
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second)


class Flat(nn.Module):
    """A head that takes a view, which needs tokens that are stored as (B, T, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4 * 6, 2)

    def forward(self, rep: Tensor) -> Tensor:
        out: Tensor = self.out(rep.transpose(1, 2).view(len(rep), -1))
        return out


@pytest.mark.parametrize("rotation_size", [None, 3])
def test_a_head_may_take_a_view_that_fits_how_the_representation_is_stored(rotation_size: int | None) -> None:
    """The rotated tensor is stored like z, here transposed tokens; after updates of the rotations as well."""
    backbone, heads = nn.Linear(3, 6), nn.ModuleList([Flat(), nn.Conv1d(6, 2, 1)])
    sgd = SGD(nn.ModuleList([backbone, heads]).parameters(), lr=0.1)
    optimizer = RotoGradOptimizer(sgd, heads, dim=1, rotation_size=rotation_size, turn_every=1)
    for _ in range(3):
        z = backbone(torch.randn(5, 4, 3)).transpose(1, 2)
        optimizer.zero_grad()
        optimizer.step([head(z).square().mean() for head in heads])
    heads.eval()
    assert heads[0](z).shape == (5, 2)
