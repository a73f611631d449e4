"""Representations that cannot be rotated."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from rotoopt import RotoGradOptimizer
from tests.asserts import assert_reads_well
from tests.bad_input.cases import Case, check, left, losses_of, parametrize, representation
from tests.contract.models import wrap

FLOAT = "A floating-point tensor must enter a head, by position or keyword, alone or in lists, tuples and dicts, got"

REPRESENTATIONS = {
    "other size": Case(
        ValueError,
        r"The representation must have 6 features along dim=\(-1,\), got 5 in shape \(5, 5\). Either \(a\) `dim` is",
        lambda m, o: lambda: left(m)(representation(m)[:, :5]),
        first=False,
    ),
    "too small": Case(
        ValueError,
        r"The representation must have at least rotation_size=4 features along dim=\(-1,\), got 3 in shape \(5, 3\)",
        lambda m, o: lambda: left(m)(m.inputs(5)),
        {"rotation_size": lambda: 4},
    ),
    "no such dimension": Case(
        ValueError,
        r"`dim` must name dimensions of the representation, got dim=\(2,\) for shape \(5, 6\). Use dim=-1 for vectors",
        lambda m, o: lambda: left(m)(representation(m)),
        {"dim": lambda: 2},
        later=False,
        fatal=True,
    ),
    "maps without dim": Case(
        ValueError,
        r"`dim` must be given for .*four or more dimensions, got none for shape \(5, 6, 1, 1\).*dim=1 for",
        lambda m, o: lambda: left(m)(representation(m)[:, :, None, None]),
        later=False,
        fatal=True,
    ),
    "one dimension without dim": Case(
        ValueError,
        r"`dim` must be given for a representation of one dimension, got none for shape \(5,\)\. Pass dim=-1 if .*"
        r"\(B,\), one number per sample cannot be rotated: pass rotate=False\.",
        lambda m, o: lambda: left(m)(representation(m)[:, 0]),
        later=False,
        fatal=True,
    ),
    "dimension twice": Case(
        ValueError,
        r"`dim` must not name a dimension twice, got \(1, -1\) for shape \(5, 6\)",
        lambda m, o: lambda: left(m)(representation(m)),
        {"dim": lambda: (1, -1)},
        later=False,
        fatal=True,
    ),
    "integers": Case(TypeError, f"{FLOAT} torch.int64", lambda m, o: lambda: left(m)(torch.ones(5, 6).long())),
    "complex": Case(TypeError, f"{FLOAT} torch.complex64", lambda m, o: lambda: left(m)(torch.ones(5, 6) + 1j)),
    "nested": Case(
        TypeError,
        "The representation must be a dense tensor, got a nested tensor. Give the heads its values or a padded one",
        lambda m, o: lambda: left(m)(torch.nested.as_nested_tensor(representation(m)[None], layout=torch.jagged)),
    ),
    "sparse": Case(
        TypeError,
        "The representation must be a dense tensor, got one of layout torch.sparse_coo. Give the heads its values",
        lambda m, o: lambda: left(m)(representation(m).to_sparse()),
    ),
    "object": Case(
        TypeError,
        f"{FLOAT} SimpleNamespace. Objects of other classes are not searched: list the modules inside of the head",
        lambda m, o: lambda: left(m)(SimpleNamespace(z=representation(m))),
    ),
    "iterator": Case(
        TypeError,
        rf"{FLOAT} zip\. Objects of .*\. Pass list\(\.\.\.\) of an iterator",
        lambda m, o: lambda: left(m)(zip([torch.ones(5, 6)], strict=True)),
    ),
    "no input": Case(TypeError, f"{FLOAT} no input. Objects of", lambda m, o: lambda: left(m)()),
    "list to rotate": Case(
        TypeError,
        "`rotate` must be given the representation, a floating-point tensor, got a list",
        lambda m, o: lambda: o.rotate([1.0]),
        {"num_tasks": lambda: 2},
    ),
    "rotate with heads": Case(
        RuntimeError,
        "`rotate` must be used with num_tasks=K, got an optimizer with `heads`. Their hooks rotate already",
        lambda m, o: lambda: o.rotate(representation(m)),
    ),
    "functional head without rotate": Case(
        RuntimeError,
        "The loss of task 0 must pass through its rotated head, got one that passes through: none.*functional head",
        lambda m, o: lambda: o.step(losses_of(*m(m.inputs(5)))),
        {"num_tasks": lambda: 2},
    ),
}


@parametrize(REPRESENTATIONS)
def test_representation(case: Case, steps: int) -> None:
    check(case, steps)


CHANNELS: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": lambda: nn.Conv1d(8, 2, 3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 2, 3),
    "BatchNorm1d": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(20, 2)),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "Linear": lambda: nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2)),
}


def trained(make: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any) -> Any:
    z, heads = nn.Parameter(torch.randn(shape)), [make(), make()]
    optimizer = RotoGradOptimizer(SGD([z, *nn.ModuleList(heads).parameters()], lr=0.1), heads, **options)
    optimizer.step([head(z).square().mean() for head in heads])
    return optimizer


@pytest.mark.parametrize("options", [{}, {"rotation_size": 4}])
@pytest.mark.parametrize("first", CHANNELS)
def test_channels_before_time_need_dim(first: str, options: dict[str, Any]) -> None:
    make = CHANNELS[first]
    message = (
        r"`dim` must be given for a representation whose features are not in its last dimension, got none for shape "
        rf"\(4, 8, 20\) and a head that begins with {first}, which takes 8 features\. Use dim=1 for the channels"
    )
    with pytest.raises(ValueError, match=message) as raised:
        trained(make, (4, 8, 20), **options)
    assert_reads_well(str(raised.value))
    assert trained(make, (4, 8, 20), dim=1).rotations.size == 8
    assert trained(make, (4, 8, 20), rotate=False).last_step.finite


def test_a_map_without_a_batch_needs_dim() -> None:
    make = lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(8, 2, 3))  # noqa: E731
    with pytest.raises(ValueError, match=r"begins with Conv2d, .* Use dim=0 for the channels of maps \(C, H, W\), and"):
        trained(make, (8, 5, 6))
    assert trained(make, (8, 5, 6), dim=0).rotations.size == 8
    assert trained(lambda: nn.Sequential(nn.Unflatten(0, (1, 1)), nn.Conv2d(1, 2, 1)), (1, 5, 6)).rotations.size == 6


def test_single_numbers_cannot_be_rotated() -> None:
    message = r"`dim` must name dimensions of the representation, got dim=\(-1,\) for shape \(\)\. .* rotate=False for"
    with pytest.raises(ValueError, match=message):
        trained(nn.PReLU, ())
    optimizer = trained(nn.PReLU, (), rotate=False)
    assert optimizer.last_step.grad_norms.isfinite().all()


ELSEWHERE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any, int | None]] = {
    "samples of vectors": (lambda: nn.Linear(8, 2), (4, 8), 0, -1),
    "positions of tokens": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(8, 2)), (4, 5, 8), 1, -1),
    "steps of a signal": (lambda: nn.Conv1d(8, 2, 3), (4, 8, 20), -1, 1),
    "columns of maps": (lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(8, 2, 3)), (4, 8, 5, 6), -1, 1),
    "rows of normalized maps": (lambda: nn.BatchNorm2d(8), (4, 8, 5, 6), 2, 1),
    "depth of volumes": (lambda: nn.Conv3d(8, 2, 1), (4, 8, 3, 3, 3), 2, 1),
    "columns of a map": (lambda: nn.Conv2d(8, 2, 3), (8, 5, 6), -1, 0),
    "features": (lambda: nn.Linear(8, 2), (4, 5, 8), -1, None),
    "channels": (lambda: nn.Conv2d(8, 2, 3), (4, 8, 5, 6), (1, 2), None),
    "features of windows": (lambda: nn.Sequential(nn.Linear(8, 2)), (4, 8, 5, 8), -1, None),
    "features of spectra": (lambda: nn.Sequential(nn.Unflatten(0, (1, 1)), nn.Conv2d(1, 2, 1)), (1, 5, 8), -1, None),
    "channels that are pooled": (CHANNELS["Linear"], (4, 8, 8), 1, None),
    "other layers": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(160, 2)), (4, 8, 20), 1, None),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_dim_of_something_else_than_the_features_is_reported(kind: str) -> None:
    make, shape, dim, features = ELSEWHERE[kind]
    message = rf"`dim` should be the dimension of the features, got dim=\({dim},\).*8 features.*Use dim={features}\."
    with nullcontext() if features is None else pytest.warns(UserWarning, match=message):
        trained(make, shape, dim=dim)


class Beside(nn.Module):
    """A head that begins with a layer of another input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(8, 2)

    def forward(self, z: Tensor, other: Tensor) -> Tensor:
        out: Tensor = z.mean() * self.scale(other)
        return out


def test_a_first_layer_that_may_take_another_input_is_not_used_to_infer_dim() -> None:
    z, heads = nn.Parameter(torch.randn(4, 8, 20)), [Beside(), Beside()]
    optimizer = RotoGradOptimizer(SGD([z, *nn.ModuleList(heads).parameters()], lr=0.1), heads)
    optimizer.step([head(z, torch.randn(4, 8)).square().mean() for head in heads])
    assert optimizer.rotations.size == 20


def test_a_single_sample_needs_no_dim_in_evaluation() -> None:
    optimizer = trained(lambda: nn.Linear(8, 2), (4, 8), init="haar")
    head, z = optimizer._core.heads[0][0].eval(), torch.randn(8)
    assert_close(head(z), head(z[None])[0])


TOKENS = {
    "linear": lambda: nn.Linear(8, 2),
    "normalized": lambda: nn.Sequential(nn.LayerNorm(8), nn.Conv1d(20, 2, 1)),
    "transposed": lambda: Transposed(),
    "as many as features": lambda: nn.Sequential(nn.ReLU(), nn.Linear(8, 20)),
}


class Transposed(nn.Module):
    """A convolution over time, of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(8, 2, 3)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layer(z.transpose(1, 2))
        return out


@pytest.mark.parametrize("make", TOKENS.values(), ids=TOKENS)
def test_tokens_need_no_dim(make: Callable[[], nn.Module]) -> None:
    assert trained(make, (4, 20, 8)).rotations.size == 8


def test_rotations_before_the_first_forward_pass() -> None:
    _, optimizer = wrap()
    message = "`rotations` must exist before they are read, got none. They are created in the first forward pass"
    with pytest.raises(RuntimeError, match=message):
        _ = optimizer.rotations.matrices
    with pytest.raises(RuntimeError, match=message):
        _ = optimizer.rotations[0]


def test_rotations_before_the_first_transformation() -> None:
    model, optimizer = wrap()
    message = (
        "^The rotations must exist on the device of the model before it is exported, traced or transformed by "
        r"torch\.func, got none there\. They are created, or moved, when the model runs: run it once before\.$"
    )
    with pytest.raises(RuntimeError, match=message):
        torch.func.vmap(left(model))(torch.randn(5, 6))
    assert optimizer.rotations.size is None
