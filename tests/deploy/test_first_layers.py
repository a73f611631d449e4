"""Which heads a rotation can be folded into, and that the others keep it: predictions do not change."""

import gc
import re
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rotoopt._capture.representation import RotatedDims
from rotoopt._deploy.first_layers import CONVOLUTIONS, UnfoldableError, find_first_layers
from tests.asserts import eps, relative_error
from tests.contract.models import assert_same
from tests.heads import FOLDABLE, OWNED, UNFOLDABLE, VECTORS, Case, Head, predict, trained
from tests.samplers import DTYPES, SEEDS

SHOULD, KEPT = (
    re.escape(sentences)
    for sentences in (
        "Every head should begin with a linear layer of its own, to fold its rotation into, got some that do not. ",
        ". They keep their rotations, as a buffer `rotation` that a forward pre-hook applies. Predictions are the "
        "same, but the state dict has these keys in addition, and does not load into a plain model: save the model as "
        "a whole, with torch.export, or with torch.save, which needs rotoopt to load it, or begin these heads with "
        "nn.Linear or nn.Conv2d when you train again.",
    )
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FOLDABLE)
def test_folded_head_is_a_plain_head(name: str, dtype: torch.dtype) -> None:
    case = FOLDABLE[name]
    head, plain = case.make(), case.make().to(dtype).eval()
    optimizer, z = trained(case, head, dtype)
    before = predict(head, z)
    optimizer.fold()
    assert not head._forward_pre_hooks
    plain.load_state_dict(head.state_dict())
    tolerance = 20 * eps(dtype)  # of the rotated z, and of the weights: sums of at most 150 products
    for after, expected in zip(predict(plain, z), before, strict=True):
        assert relative_error(after, expected) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    head = nn.Linear(6, 50)
    optimizer, _ = trained(Case(lambda: head), head, dtype)
    expected = (head.weight.detach().double() @ optimizer.rotations[0].double()).to(dtype)
    optimizer.fold()
    assert_same(head.weight.detach(), expected)


@pytest.mark.filterwarnings("ignore:`dim` should be the dimension of the features")  # rotated samples
@pytest.mark.parametrize("name", UNFOLDABLE)
def test_other_heads_keep_their_rotation(name: str) -> None:
    case = UNFOLDABLE[name]
    head, plain = case.make(), case.make()
    optimizer, z = trained(case, head)
    before, rotation = predict(head, z, case.others), optimizer.rotations[0].clone()
    weights = weights_of(head)
    with pytest.warns(UserWarning, match=rf"(?s)^{SHOULD}heads\[0\]: {case.reason}.*{KEPT}$"):
        optimizer.fold()
    assert_same(predict(head, z, case.others), before)
    assert_same(weights_of(head), {**weights, "rotation": rotation})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*rotation"):
        plain.load_state_dict(head.state_dict())


def weights_of(head: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


def traces(head: nn.Module) -> list[Any]:
    """Return everything that a test run could change."""
    modules = list(head.modules())
    hooks = [
        id(hook) for each in modules for hook in (*each._forward_pre_hooks.values(), *each._forward_hooks.values())
    ]
    return [weights_of(head), [module.training for module in modules], hooks, torch.get_rng_state()]


@pytest.mark.filterwarnings("ignore:`dim` should be the dimension of the features")  # rotated samples
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in [*FOLDABLE, *UNFOLDABLE]), *((name, torch.float64) for name in FOLDABLE)],
)
def test_search_has_no_side_effects(name: str, dtype: torch.dtype) -> None:
    case = {**FOLDABLE, **UNFOLDABLE}[name]
    head = case.make()
    optimizer, _ = trained(case, head, dtype)
    for i, module in enumerate(head.modules()):
        module.training = i % 2 == 0
    before = traces(head)
    with pytest.raises(UnfoldableError, match=case.reason) if case.reason else nullcontext():
        find_first_layers(head, torch.Size(case.shape), RotatedDims(case.dim), optimizer.rotations[0])
    assert_same(traces(head), before)


@given(
    spatial=st.integers(1, 3),
    transposed=st.booleans(),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    rest=st.integers(0, 3),
    seed=SEEDS,
    dtype=DTYPES,
)
def test_convolutions(
    spatial: int, transposed: bool, kernel: int, stride: int, padding: int, rest: int, seed: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    make = CONVOLUTIONS[spatial - 1 + 3 * transposed]
    layers = [make(6, 3, kernel, stride, min(padding, kernel - 1)) for _ in range(2)]
    case = Case(lambda: layers[0], (2, 6, *[4] * spatial), 1)
    optimizer, z = trained(case, layers[0], dtype, rotation_size=6 - rest)
    before = predict(layers[0], z)
    optimizer.fold()
    layers[1].to(dtype).load_state_dict(layers[0].state_dict())
    assert relative_error(*predict(layers[1], z), *before) <= 20 * eps(dtype)


def search(function: Callable[..., Any], outputs: int = 6) -> bool:
    """Return whether a rotation can be folded into the layer ``a`` of a head."""
    head = Head(function, a=nn.Linear(6, outputs))
    try:
        return len(find_first_layers(head, torch.Size(VECTORS), RotatedDims(-1), torch.eye(6))) == 1
    except UnfoldableError:
        return False


def test_modules_must_be_found() -> None:
    """Those that share a weight are found by the garbage collector."""
    assert search(lambda self, z: self.a(z))
    head = nn.Linear(6, 2)
    gc.freeze()
    try:
        with pytest.raises(UnfoldableError, match=rf"{OWNED}.*gc.freeze\(\) hides"):
            find_first_layers(head, torch.Size(VECTORS), RotatedDims(-1), torch.eye(6))
    finally:
        gc.unfreeze()
        gc.freeze()  # as in conftest.py


def test_outputs_must_be_found() -> None:
    """A head without outputs may use z in any way."""
    assert not search(lambda self, z: setattr(self, "output", self.a(z) + z.tanh()))


def test_numbers_among_the_outputs() -> None:
    assert search(lambda self, z: (self.a(z), 1.0, "name", None))
    assert not search(lambda self, z: (self.a(z), float(z.sum())))


CONSTANTS = [
    torch.ones(2),
    torch.zeros(2),
    torch.full((2,), torch.inf),
    torch.ones(3),
    torch.ones(0),
    1.0,
    "name",
    None,
]


@pytest.mark.parametrize(("i", "j"), [*product(range(len(CONSTANTS)), repeat=2)])
def test_other_outputs_are_compared_by_equality(i: int, j: int) -> None:
    """The head runs once with the rotation and once without."""
    constants = iter([CONSTANTS[i], CONSTANTS[j]])
    assert search(lambda self, z: (self.a(z), next(constants))) == (i == j)


def test_number_and_shape_of_the_outputs() -> None:
    assert not search(lambda self, z: [self.a(z)] * int((z > 0).sum()))
    assert not search(lambda self, z: self.a(z)[z[:, 0] > 0])


def test_an_activation_may_work_in_place() -> None:
    assert not search(lambda self, z: self.a(z.relu_()))


def test_masked_outputs() -> None:
    """Infinite and NaN outputs are equal before and after; the others are compared."""
    mask = torch.tensor([-torch.inf, 0.0, torch.nan])
    assert search(lambda self, z: self.a(z) + mask, 3)
    assert not search(lambda self, z: self.a(z) + z[:, :3] + mask, 3)


def test_outputs_that_cancel() -> None:
    """Up to rounding errors, of which only the size is known."""
    assert search(lambda self, z: torch.stack([self.a(z), 3 * self.a(z) - self.a(z) - 2 * self.a(z)]))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_of_the_outputs_does_not_matter(scale: float) -> None:
    assert search(lambda self, z: scale * self.a(z))
    assert not search(lambda self, z: scale * (self.a(z) + 1e-6 * z))
    assert not search(lambda self, z: scale * (1 + 1e-6 * (self.a(z) + z)))
