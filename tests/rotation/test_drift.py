"""Rotations stay orthogonal over any number of turns, because some columns are repaired in each turn."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rotoopt._rotation.cayley import DenseSkew, SampleSkew, Skew, orthogonality_error, repair_columns_
from tests.asserts import assert_same_bits, eps
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, SIZES, Sampler

ANGLES = torch.tensor([1e-4, 1e-3, 1e-2, 0.1, 0.6])  # radians per turn, one rotation for each
FORMS: dict[str, Callable[[Tensor, Tensor], Skew]] = {
    "low rank": SampleSkew,
    "dense": lambda W, V: DenseSkew(W @ V.mT),
}


@pytest.mark.parametrize("turns", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_many_turns_by_noise_do_not_drift(form: str, turns: int) -> None:
    """Updates like those of :class:`CayleyStep`, but with steps that do not decrease."""
    sampler, m, n = Sampler(0, torch.float32), 16, 2
    R = sampler.rotations(len(ANGLES), m)
    everywhere = torch.ones(len(ANGLES), dtype=torch.bool)
    for start in range(0, turns, 1000):
        Ws, Vs = sampler.normal(1000, len(ANGLES), m, n), sampler.normal(1000, m, n)
        for i, (W, V) in enumerate(zip(Ws, Vs, strict=True)):
            skew = FORMS[form](W, V)
            # The angle of an update is the root of the sum of squares of the angles of its planes.
            skew.turn_(R, ANGLES / skew.half_squared_norm().sqrt())
            repair_columns_(R, (start + i) % m, 1, everywhere)
        assert orthogonality_error(R).max() <= 1e-6
    assert (torch.linalg.slogdet(R.double()).sign == 1).all()


def sweep(R: Tensor, width: int) -> Tensor:
    R, m = R.clone(), R.shape[-1]
    for first in range(0, m, width):
        repair_columns_(R, first, width, torch.ones(len(R), dtype=torch.bool))
    return R


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, scale=st.floats(-8, -3), width=st.integers(1, 5))
def test_sweep_of_the_repair_squares_the_error(K: int, m: int, seed: int, scale: float, width: int) -> None:
    sampler = Sampler(seed)
    error = sampler.normal(K, m, m)
    exact = sampler.rotations(K, m)
    R = exact + 10**scale * error / torch.linalg.matrix_norm(error, 2)[:, None, None]

    def spectral(matrices: Tensor) -> float:
        return float(torch.linalg.matrix_norm(matrices.mT @ matrices - torch.eye(m).double(), 2).max())

    # A full Newton-Schulz step leaves 3/4 e^2. Column by column, errors of earlier columns add to it: up to 4 e^2.
    assert spectral(sweep(R, width)) <= 4 * spectral(R) ** 2 + 20 * eps(torch.float64) * m**0.5


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, scale=st.floats(-8, -1), data=st.data())
def test_repair_is_its_formula(K: int, m: int, seed: int, scale: float, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, m - 1))
    count = data.draw(st.integers(1, m - first)) if first else m
    sampler = Sampler(seed)
    R, identity = sampler.rotations(K, m) + 10**scale * sampler.normal(K, m, m), torch.eye(m).double()
    J = slice(first, first + count)
    P, E = identity[:, J], (R.mT @ R - identity)[:, :, J]
    expected = R - 0.5 * (R @ E @ P.mT + R[:, :, J] @ E.mT - R[:, :, J] @ E[:, J] @ P.mT)
    repair_columns_(R, first, count, torch.ones(K, dtype=torch.bool))
    assert_close(R, expected, rtol=0, atol=1e-13)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_repair_keeps_rotations_and_other_columns(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    sampler = Sampler(seed, dtype)
    R = sampler.rotations(K, m)
    assert (sweep(R, 1) - R).abs().max() <= 20 * eps(dtype)
    where, repaired = torch.ones(K, dtype=torch.bool), R * (1 + 1e-3)
    still, before = sampler.integer(K), repaired.clone()
    where[still] = False
    repair_columns_(repaired, 0, 1, where)
    assert_same_bits(repaired[still], before[still])
    assert all((repaired[k] != before[k]).any() for k in range(K) if k != still)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS)
def test_two_sweeps_repair_what_was_saved_in_low_precision(K: int, m: int, seed: int) -> None:
    rounded = Sampler(seed, torch.float32).rotations(K, m).bfloat16().float()
    assert orthogonality_error(sweep(sweep(rounded, 1), 1)).max() <= 1e-6
