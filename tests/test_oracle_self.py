"""The oracle compared with numbers computed by hand, and its formulas with their definitions."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from tests.oracle import (
    LossFn,
    Metric,
    Oracle,
    References,
    ascent,
    cayley_step,
    gradnorm_gradient,
    layout,
    longest,
    rotate,
    rotation_gradient,
    shares,
)

NAN = math.nan
AT_REST = 1e-12  # a learning rate that changes nothing


def double(*values: float | tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def linear(*weight: tuple[float, float]) -> nn.Linear:
    layer = nn.Linear(2, len(weight), bias=False)
    layer.weight = nn.Parameter(double(*weight))
    return layer


def skew(m: int) -> Tensor:
    A = randn(m, m)
    return A - A.T


class Example:
    """Two linear heads on z = x = (1, 2): losses 11 and 2, gradients (3, 4) and (0, 1) at z.

    So the norms are 5 and 1, U_0 = (.6, .8), U_1 = (0, 1) and V = (.3, .9), and the lower left
    entries of the rotation gradients are -.3 and .3. SGD at rate 1 subtracts gradients as they are.
    Rotations turn in every step.
    """

    def __init__(self, lr: float = 1.0, turn_every: int = 1, **options: Any) -> None:
        self.backbone = linear((1.0, 0.0), (0.0, 1.0))
        self.heads = [linear((3.0, 4.0)), linear((0.0, 1.0))]
        parameters = nn.ModuleList([self.backbone, *self.heads]).parameters()
        self.oracle = Oracle(self.backbone, self.heads, SGD(parameters, lr=lr), turn_every=turn_every, **options)

    def step(self, losses: Sequence[LossFn | None] = (torch.sum, torch.sum)) -> Tensor:
        return self.oracle.step(double((1, 2)), losses)

    @property
    def combined(self) -> Tensor:
        """The gradient of the backbone at z in its only step: the gradient of its weight is c x'."""
        return (torch.eye(2) - self.backbone.weight.detach())[:, 0]

    @property
    def angles(self) -> Tensor:
        R = self.oracle.matrices
        return torch.atan2(R[:, 1, 0], R[:, 0, 0])


def test_first_step() -> None:
    example = Example()
    assert_close(example.step(), double(11, 2))
    assert_close(example.oracle.norms, double(5, 1))
    # The references are the norms themselves, so alpha = (1/2, 1/2), C = 3, w = (3/5, 3/1).
    assert_close(example.oracle.weights, double(0.6, 3))
    assert_close(example.backbone.weight.detach(), double((1 - 1.8, -3.6), (-5.4, 1 - 10.8)))
    assert_close(example.heads[0].weight.detach(), double((3 - 1, 4 - 2)))
    assert_close(example.heads[1].weight.detach(), double((0 - 1, 1 - 2)))


def plane_angle(size: float) -> float:
    """Return the angle of a turn of this size in a plane, where G^-1 S G^-1 = S / det G, and tr G = 2 + 2 / 10."""
    return 2 * math.atan(size / math.sqrt(1.1) / 2)


@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0), (1.0, 0.25, 0.0, 0.5)], ids=["constant rate", "schedule"])
def test_rotations_of_some_steps(shares: Sequence[float]) -> None:
    example, lr = Example(lr=AT_REST, rotation_lr=0.06), 0.06
    angle, squares, apart = 0.0, 0.0, math.acos(0.8)
    for share in shares:
        example.oracle.optimizer.param_groups[0]["lr"] = AT_REST * share
        example.step()
        # R_k' turns G_k, and between unit vectors at an angle the entry of S is half its sine.
        entry = math.sin(apart - 2 * angle) / 2
        squares += entry**2
        angle += plane_angle(lr * share * entry / math.sqrt(squares))
        assert_close(example.angles, double(-angle, angle))


def test_rotations_turn_in_every_third_step() -> None:
    example, turned, before = Example(lr=AT_REST, turn_every=3), [], double(0, 0)
    for _ in range(8):
        example.step()
        turned.append(not torch.equal(example.angles, before))
        before = example.angles
    assert turned == [True, False, False, True, False, False, True, False]


def test_metric_of_three_turns() -> None:
    metric = Metric(2)
    assert_close(metric.update(double((0, 0))), double((1.1, 0), (0, 1.1)))  # nothing is known
    metric = Metric(2)
    assert_close(metric.update(double((3, 0), (0, 1))), double((1.9, 0), (0, 0.3)))
    assert_close(metric.update(double((1, 1))), double((1.5, 0.5), (0.5, 0.7)))
    assert_close(metric.update(double((0, 0))), double((1.5, 0.5), (0.5, 0.7)))


def test_way_up_prefers_planes_of_little_variance() -> None:
    S, G = double((0, 1, 1), (-1, 0, 0), (-1, 0, 0)), double((1, 0, 0), (0, 2, 0), (0, 0, 0.5))
    D, size = ascent(S, G)
    assert_close(D, double((0, 0.5, 2), (-0.5, 0, 0), (-2, 0, 0)))
    assert size == pytest.approx(math.sqrt((0.25 * 2 + 4 * 0.5 + 0.25 + 4) / 3))
    assert longest(0.1 * S, 0.1 * D) == pytest.approx(min(10 / math.sqrt(4.25), 2 * 2.5 / 4.25))
    assert longest(10 * S, 10 * D) == pytest.approx(0.1 / math.sqrt(4.25))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"rotation_lr": 10.0}, (-0.6, 0.6), id="capped where the objective surely rises"),
        pytest.param({"rotation_lr": 0.06, "rotate": (True, False)}, (-0.06 / math.sqrt(1.1), 0), id="frozen"),
    ],
)
def test_options_of_a_turn(options: dict[str, Any], expected: tuple[float, float]) -> None:
    example = Example(lr=AT_REST, **options)
    example.step()
    assert_close(example.angles, 2 * torch.atan(double(*expected) / 2))


def test_rotation_optimizer_steps_immediately() -> None:
    example, expected = Example(turn_every=8, rotation_optimizer=lambda p: SGD(p, lr=0.1)), (-0.03, 0.03)
    example.step()
    assert_close(example.angles, 2 * torch.atan(double(*expected) / 2))


def test_absent_task() -> None:
    example = Example()
    assert_close(example.step([torch.sum, None]), double(11, NAN), equal_nan=True)
    assert_close(example.oracle.weights, double(1, NAN), equal_nan=True)
    assert_close(example.combined, double(3, 4))
    assert_close(example.heads[1].weight.detach(), double((0, 1)))
    assert_close(example.angles, double(0, 0))


def test_non_finite_loss_moves_no_rotation() -> None:
    example = Example(lr=0.0, weighting="gradnorm")
    example.step([torch.sum, lambda prediction: prediction.sum() * math.inf])
    assert_close(example.angles, double(0, 0))
    assert_close(example.oracle.logits, double(0, 0))
    assert_close(example.oracle.norm_references.values, double(5, NAN), equal_nan=True)


def test_normalized_losses_reach_the_heads() -> None:
    example = Example(normalize_losses=True, weighting="equal")
    example.step()
    assert_close(example.combined, double(3 / 11, 4 / 11 + 1 / 2))
    assert_close(example.heads[1].weight.detach(), double((0 - 1 / 2, 1 - 2 / 2)))


def test_callable_weighting_and_backbone_loss() -> None:
    example = Example(weighting=lambda J: J[1] - J[0])
    example.oracle.step(double((1, 2)), [torch.sum, torch.sum], backbone_loss=torch.sum)
    assert_close(example.combined, double(-3 + 1, -3 + 1))


def test_gradnorm_steps() -> None:
    example = Example(lr=0.0, weighting="gradnorm", weight_lr=0.1)
    example.step()
    assert_close(example.oracle.weights, double(1, 1))
    # T = |(3, 5) / 2| = 2.9 lies between the norms; a first Adam step has length lr.
    assert_close(example.oracle.logits, double(-0.1, 0.1))
    example.step()
    assert_close(example.oracle.weights, 2 * double(-0.1, 0.1).softmax(0))


@pytest.mark.parametrize("present", [[0, 1, 2, 3], [0, 3], [2], []])
def test_gradnorm_gradient_is_that_of_its_loss(present: list[int]) -> None:
    J, ratios, logits = randn(len(present), 7), torch.rand(len(present)).double(), randn(4)
    logits.requires_grad_()
    weights = (4 * logits.softmax(0))[present]
    mean = (weights[:, None] * J).sum(dim=0).detach() / max(len(present), 1)
    targets = mean.norm() * (ratios / ratios.mean()) ** 1.5
    (expected,) = torch.autograd.grad((weights * J.norm(dim=1) - targets).abs().sum(), logits)
    if len(present) < 2:  # 0, except for the sign of a rounding error
        expected = torch.zeros(4).double()
    assert_close(gradnorm_gradient(J, logits.detach(), ratios, present, 1.5), expected)


def test_shares() -> None:
    assert_close(shares(double(3, 4), double(3, 2)), double(1 / 3, 2 / 3))
    assert_close(shares(double(2, 9, 6), double(1, NAN, 2)), double(2, 2.5, 3) / 7.5)
    assert_close(shares(double(2, 9), double(NAN, NAN)), double(0.5, 0.5))
    assert_close(shares(double(0, 0), double(1, NAN)), double(0.5, 0.5))


def test_references_are_taken_twice_and_only_when_valid() -> None:
    references = References(n_tasks=3, burn_in=2)
    for t, (values, expected) in enumerate(
        [
            (double(1, NAN, 0), double(1, NAN, NAN)),
            (double(2, 3, math.inf), double(1, 3, NAN)),
            (double(4, 0, 5), double(4, 3, 5)),
            (double(6, 7, 8), double(4, 7, 5)),
        ]
    ):
        references.update(values, t)
        assert_close(references.values, expected, equal_nan=True)


def test_rotation_gradient_is_that_of_the_alignment() -> None:
    U, V, A = randn(5, 4), randn(5, 4), torch.zeros(4, 4).double().requires_grad_()
    R = cayley_step(torch.eye(4).double(), A.tril(-1) - A.tril(-1).T)
    (expected,) = torch.autograd.grad((U @ R * V).sum(), A)  # rows of U @ R are R'u
    assert_close(rotation_gradient(U, V).tril(-1), expected)


def test_cayley_step() -> None:
    identity = torch.eye(5).double()
    R, S = torch.linalg.matrix_exp(skew(5)), skew(5)
    turned = cayley_step(R, S)
    assert_close(turned.T @ turned, identity)
    assert_close(torch.linalg.slogdet(turned).sign, double(1)[0])
    assert_close(turned @ (identity - S / 2), R @ (identity + S / 2))
    assert_close(cayley_step(turned, -S), R)
    assert_close(cayley_step(identity, 1e-4 * S), torch.linalg.matrix_exp(1e-4 * S))


@pytest.mark.parametrize(
    ("shape", "dims", "rotated"),
    [
        ((3, 6), (-1,), "bj->bi"),
        ((3, 2, 6), (-1,), "btj->bti"),
        ((3, 6, 2, 2), (1,), "bjhw->bihw"),
        ((3, 2, 3, 4), (1, 2), "bklw->bijw"),
        ((3, 2, 3, 4), (-2, 1), "bklw->bijw"),
        ((2, 4, 3), (0, 2), "kbl->ibj"),
    ],
)
@pytest.mark.parametrize("m", [6, 4])
def test_rotate(shape: tuple[int, ...], dims: tuple[int, ...], rotated: str, m: int) -> None:
    z, R = randn(*shape), torch.linalg.matrix_exp(skew(m))
    whole = torch.eye(6).double()
    whole[:m, :m] = R
    if len(dims) == 2:
        expected = torch.einsum(f"ijkl,{rotated}", whole.view(2, 3, 2, 3), z)
    else:
        expected = torch.einsum(f"ij,{rotated}", whole, z)
    assert_close(rotate(z, R, layout(z.shape, dims)), expected)


def test_positions_of_a_map_are_samples() -> None:
    weight, x = randn(4, 3), randn(2, 3, 5, 5)
    per_pixel = nn.Conv2d(3, 4, 1, bias=False).double()
    per_row = nn.Linear(3, 4, bias=False).double()
    per_pixel.weight = nn.Parameter(weight[:, :, None, None].clone())
    per_row.weight = nn.Parameter(weight.clone())
    matrices = []
    for backbone, batch, dim in ((per_pixel, x, 1), (per_row, x.movedim(1, -1).reshape(-1, 3), -1)):
        optimizer = SGD(backbone.parameters(), lr=1e-4)
        oracle = Oracle(backbone, [nn.Identity()] * 2, optimizer, dim=dim, rotation_lr=0.1, turn_every=1)
        for _ in range(3):
            oracle.step(batch, [lambda r: r.pow(3).sum(), lambda r: r.exp().sum()])
        matrices.append(oracle.matrices)
    assert_close(matrices[0], matrices[1])
    assert_close(per_pixel.weight.flatten(1), per_row.weight)
    assert not torch.allclose(matrices[0], torch.eye(4).double(), atol=1e-2)
