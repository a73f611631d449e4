"""Batch spectral shrinkage equals a float64 decomposition for any features."""

import copy
import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rotoopt import RotoGradOptimizer
from rotoopt.regularization import BatchSpectralShrinkage
from tests.asserts import relative_error
from tests.contract.models import assert_same, parameters
from tests.regularization import oracle
from tests.samplers import DTYPES, SEEDS, Sampler

ROWS, COLUMNS = st.integers(1, 12), st.integers(1, 12)


def measure(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return value and gradient."""
    features = features.detach().clone().requires_grad_()
    value = BatchSpectralShrinkage(k)(features)
    (grad,) = torch.autograd.grad(value, features)
    return value.detach(), grad


def conditioned(b: int, d: int, log_condition: float, seed: int) -> Tensor:
    """Return a float64 matrix with singular values from 1 to 10^-log_condition."""
    n, generator = min(b, d), torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64))[0] for m in (b, d))
    matrix: Tensor = U * torch.logspace(0, -log_condition, n, dtype=torch.float64) @ V.mT
    return matrix


@given(b=ROWS, d=COLUMNS, data=st.data(), seed=SEEDS, dtype=DTYPES, scale=st.floats(-6, 6))
def test_value_and_gradient_equal_the_oracle(
    b: int, d: int, data: st.DataObject, seed: int, dtype: torch.dtype, scale: float
) -> None:
    features = Sampler(seed, dtype).normal(b, d) * 10**scale
    k = data.draw(st.integers(1, min(b, d)))
    value, grad = measure(features, k)
    assert value.dtype == grad.dtype == dtype
    expected_value, expected_grad = oracle.bss(features, k)
    sigma = torch.linalg.svdvals(features.double())
    # Rounding turns the singular vectors by eps / gap, which changes the gradient. The value has its minimum there, so
    # it changes by the square of the angle, and by the error of sigma itself, eps times the largest one, which the
    # oracle has as well.
    gap = float(sigma[-k - 1] ** 2 - sigma[-k] ** 2) / float(sigma[0] ** 2) if k < len(sigma) else 1.0
    exact, largest = torch.finfo(torch.float64).eps, float(sigma[0])
    angle = 100 * exact / max(gap, exact)
    value_atol = largest * (20 * exact * float(sigma[-k]) + largest * angle**2)
    assert_close(value, expected_value.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=value_atol)
    grad_atol = 2 * largest * (angle + 20 * exact)
    assert_close(grad, expected_grad.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=grad_atol)


# Features as in practice, and worse. The numbers are the errors of the gradient of the original in float32.
HARD = {
    "gaussian": torch.randn(48, 512, generator=torch.Generator().manual_seed(0)),  # 5e-6
    "relu": (torch.randn(48, 512, generator=torch.Generator().manual_seed(0)) + 3).relu(),  # 8e-5
    "mean-heavy": 100 + 0.1 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0)),  # 2e-2
    "condition 1e4": conditioned(32, 256, 4, 0).float(),  # 6e-4
    "condition 1e5": conditioned(256, 32, 5, 0).float(),
    "tall": torch.randn(512, 48, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", HARD)
def test_ill_conditioned_features_are_accurate(name: str, k: int) -> None:
    """Measured: value 4e-8, gradient 3e-7; with a Gram matrix in float32, the smaller half has no correct digit."""
    value, grad = measure(HARD[name], k)
    expected_value, expected_grad = oracle.bss(HARD[name], k)
    assert relative_error(value, expected_value) < 1e-6
    assert relative_error(grad, expected_grad) < 1e-6


@pytest.mark.parametrize("k", [1, 3])
def test_float64_features_with_a_condition_of_a_million(k: int) -> None:
    features = conditioned(20, 30, 6, 0)
    value, grad = measure(features, k)
    expected_value, expected_grad = oracle.bss(features, k)
    assert relative_error(value, expected_value) < 1e-6
    assert relative_error(grad, expected_grad) < 1e-3  # linear, and not quadratic, in the angle of the vectors


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 4)])
def test_gradcheck(shape: tuple[int, int], k: int) -> None:
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(BatchSpectralShrinkage(k), features)


@given(b=ROWS, d=COLUMNS, data=st.data(), seed=SEEDS)
def test_rotated_features_have_the_same_penalty_and_a_rotated_gradient(
    b: int, d: int, data: st.DataObject, seed: int
) -> None:
    sampler = Sampler(seed)
    features, k = sampler.normal(b, d), data.draw(st.integers(1, min(b, d)))
    R = sampler.rotations(1, d)[0]
    value, grad = measure(features, k)
    rotated_value, rotated_grad = measure(features @ R.mT, k)
    scale = float(torch.linalg.matrix_norm(features, 2))
    assert_close(rotated_value, value, rtol=1e-12, atol=1e-12 * scale**2)
    sigma = torch.linalg.svdvals(features)
    separate = k == len(sigma) or float(sigma[-k - 1] - sigma[-k]) > 1e-2 * scale  # or else it jumps
    if separate:
        assert_close(rotated_grad, grad @ R.mT, rtol=1e-9, atol=1e-9 * scale)


@given(b=ROWS, d=COLUMNS, data=st.data(), seed=SEEDS)
def test_permuted_samples_and_features_have_the_same_penalty(b: int, d: int, data: st.DataObject, seed: int) -> None:
    features, k = Sampler(seed).normal(b, d), data.draw(st.integers(1, min(b, d)))
    rows, columns = torch.randperm(b), torch.randperm(d)
    assert_close(measure(features[rows][:, columns], k)[0], measure(features, k)[0], rtol=1e-10, atol=1e-13)


@given(b=ROWS, d=COLUMNS, data=st.data(), seed=SEEDS, power=st.integers(-60, 60))
def test_penalty_is_homogeneous_of_degree_two(b: int, d: int, data: st.DataObject, seed: int, power: int) -> None:
    """Exactly, if the scale is a power of two."""
    features, k = Sampler(seed).normal(b, d), data.draw(st.integers(1, min(b, d)))
    value, grad = measure(features, k)
    scaled_value, scaled_grad = measure(features * 2.0**power, k)
    assert_close(scaled_value, value * 4.0**power, rtol=1e-12, atol=0.0)
    assert_close(scaled_grad, grad * 2.0**power, rtol=1e-9, atol=1e-12 * 2.0**power)


@given(b=ROWS, d=COLUMNS, seed=SEEDS)
def test_penalty_on_all_singular_values_is_the_squared_norm(b: int, d: int, seed: int) -> None:
    features = Sampler(seed).normal(b, d)
    value, grad = measure(features, min(b, d))
    assert_close(value, features.square().sum(), rtol=1e-13, atol=0.0)
    assert_close(grad, 2 * features, rtol=1e-12, atol=1e-13)


@given(b=ROWS, d=COLUMNS, seed=SEEDS)
def test_penalty_grows_with_k_and_with_samples(b: int, d: int, seed: int) -> None:
    """By interlacing: the smallest singular values of a matrix with one more column are not smaller, if b <= d."""
    features = Sampler(seed).normal(b, d)
    values = [measure(features, k)[0] for k in range(1, min(b, d) + 1)]
    assert all(low <= high for low, high in itertools.pairwise(values))
    wider = features if b > d else torch.cat([features, features[:, :1]], dim=1)
    assert measure(wider, 1)[0] >= values[0] * (1 - 1e-12)


DEGENERATE = {
    "identity": torch.eye(5),
    "zeros": torch.zeros(5, 7),
    "duplicates": torch.ones(6, 4),
    "one sample": torch.randn(1, 5, generator=torch.Generator().manual_seed(0)),
    "huge": 1e18 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),
    "tiny": 1e-18 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_features_have_a_finite_gradient(name: str) -> None:
    features = DEGENERATE[name]
    value, grad = measure(features, 1)
    expected, _ = oracle.bss(features, 1)
    assert_close(value.double(), expected, rtol=1e-6, atol=1e-12 * float(features.abs().max()) ** 2)
    assert grad.isfinite().all()
    # Any unit vector of an eigenspace is valid: the gradient is 2 sigma u v' for one of them.
    assert float(grad.norm()) == pytest.approx(2 * float(expected.sqrt()), rel=1e-5, abs=1e-5 * float(features.norm()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_decomposed_exactly(dtype: torch.dtype) -> None:
    features = (300 * HARD["gaussian"]).to(dtype)
    value, grad = measure(features, 2)
    expected_value, expected_grad = oracle.bss(features, 2)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert relative_error(value, expected_value) < 1e-6
    assert_close(grad, expected_grad.to(dtype))  # rounded once, at the end


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    features = HARD["mean-heavy"].to(dtype)
    expected = measure(features, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(measure(features, 2), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_penalty_of_non_finite_features_is_not_finite(bad: float) -> None:
    features = torch.randn(4, 6)
    features[1, 2] = bad
    value, grad = measure(features, 1)
    assert not value.isfinite()
    assert not grad.isfinite().all()


def test_only_the_decomposition_copies_to_the_host() -> None:
    features = torch.randn(4, 6, device="meta", requires_grad=True)
    BatchSpectralShrinkage(2)(features).backward()
    assert features.grad is not None


class Doubles(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the devices of all results in float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.devices |= {each.device.type for each in tensors if each.dtype == torch.float64}
        return out


def test_features_on_a_device_without_float64_are_decomposed_on_the_cpu() -> None:
    """With a tensor subclass that reports such a device."""
    with FakeTensorMode(), Doubles() as doubles:
        value = BatchSpectralShrinkage(2)(torch.ones(4, 6, device="mps"))
    assert (value.device.type, value.dtype) == ("mps", torch.float32)
    assert doubles.devices == {"cpu"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiles_in_one_piece() -> None:
    features, penalty = torch.randn(4, 6, requires_grad=True), BatchSpectralShrinkage(2)
    compiled: Any = torch.compile(penalty, backend="aot_eager", fullgraph=True)
    assert_close(compiled(features), penalty(features))
    assert_close(torch.autograd.grad(compiled(features), features), torch.autograd.grad(penalty(features), features))


def test_copies_and_state() -> None:
    penalty, features = BatchSpectralShrinkage(k=3), torch.randn(5, 6)
    assert penalty.state_dict() == {}
    assert repr(BatchSpectralShrinkage()) == "BatchSpectralShrinkage(k=1)"
    assert repr(penalty) == "BatchSpectralShrinkage(k=3)"
    for copied in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert_same(copied(features), penalty(features))


@pytest.mark.parametrize("k", [0, -1, 1.0, True, None])
def test_number_of_singular_values_is_positive(k: Any) -> None:
    with pytest.raises(ValueError, match=f"`k` must be a positive number of singular values, got {k!r}"):
        BatchSpectralShrinkage(k)


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (0, 5)])
def test_number_of_singular_values_is_at_most_the_rank(shape: tuple[int, int]) -> None:
    found = f"got {min(shape)} for shape {shape}"
    with pytest.raises(ValueError, match=re.escape(f"`feature` must have at least k=3 singular values, {found}")):
        BatchSpectralShrinkage(3)(torch.randn(shape))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (2, 3, 4, 4), ()])
def test_features_are_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`feature` must have shape \(b, d\), got .*Pool or flatten it"):
        BatchSpectralShrinkage()(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_features_are_real_floating_point_numbers(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"must be a real floating-point tensor, got {dtype}"):
        BatchSpectralShrinkage()(torch.ones(3, 4, dtype=dtype))


def test_as_backbone_loss_it_adds_its_gradient_at_the_representation() -> None:
    """For any rotations, since the penalty does not depend on them."""
    found = []
    for weight in (0.0, 1e-1):
        torch.manual_seed(0)
        backbone, heads = nn.Linear(3, 6, bias=False), [nn.Linear(6, 1), nn.Linear(6, 2)]
        params = [*backbone.parameters(), *(param for head in heads for param in head.parameters())]
        optimizer = RotoGradOptimizer(torch.optim.SGD(params, lr=0.1), heads=heads, init="haar", normalize_losses=True)
        x = torch.randn(5, 3)
        rep = backbone(x)
        rep.retain_grad()
        losses = [head(rep).square().mean() for head in heads]
        optimizer.backward(losses, rep, backbone_loss=weight * BatchSpectralShrinkage(2)(rep))
        assert rep.grad is not None
        found.append((rep.grad, rep.detach(), parameters(heads[0]), heads[0].weight.grad))
    (without, _, _, head_grad), (with_penalty, rep, _, same_head_grad) = found
    _, expected = measure(rep, 2)
    assert_close(with_penalty - without, 0.1 * expected, rtol=1e-4, atol=1e-7)
    assert_same(same_head_grad, head_grad)
