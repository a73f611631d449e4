"""The rotations: they stay in SO(m) after any turns."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from rotoopt import Rotations
from rotoopt._rotation.cayley import MAX_TURN, orthogonality_error, turn_
from rotoopt._torch.processes import Processes
from tests.asserts import assert_rotations, assert_same_bits, eps, relative_error
from tests.oracle import cayley_step
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, SIZES, SKEW_SCALES, Sampler, haar

ROOT = Path(__file__).parents[2]


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, scale=SKEW_SCALES, dtype=DTYPES)
def test_turned_rotations_are_rotations(K: int, m: int, seed: int, scale: float, dtype: torch.dtype) -> None:
    sampler, R = Sampler(seed, dtype), haar(K, m, dtype)
    for _ in range(10):
        skew = sampler.skew(K, m)
        turn_(R.matrices, 10**scale * skew / torch.linalg.matrix_norm(skew, 2)[:, None, None])
    assert_rotations(R.matrices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_turns_do_not_drift(dtype: torch.dtype) -> None:
    sampler, R = Sampler(0, dtype), haar(2, 16, dtype)
    for _ in range(1000):
        turn_(R.matrices, 0.1 * sampler.skew(2, 16))
    # Measured: 3 eps, after 1000 turns as after 4000; without the repair 48 eps, and growing.
    assert orthogonality_error(R.matrices).max() <= 10 * eps(dtype)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_opposite_turns_undo_each_other(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    sampler, R = Sampler(seed, dtype), haar(K, m, dtype)
    before, skew = R.matrices.clone(), sampler.skew(K, m) / m
    turn_(R.matrices, skew)
    turn_(R.matrices, -skew)
    assert_close(R.matrices, before, rtol=0, atol=20 * eps(dtype) * m)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_zero_turn_keeps_every_bit(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    sampler, R = Sampler(seed, dtype), haar(K, m, dtype)
    before, skew = R.matrices.clone(), sampler.skew(K, m)
    still = sampler.integer(K)
    skew[still] = 0
    turn_(R.matrices, skew)
    assert_same_bits(R.matrices[still], before[still])


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, scale=st.floats(-8, 0), dtype=DTYPES)
def test_turns_are_independent(K: int, m: int, seed: int, scale: float, dtype: torch.dtype) -> None:
    sampler, R = Sampler(seed, dtype), haar(K, m, dtype)
    before, skew = R.matrices.clone(), 10**scale * sampler.skew(K, m) / m
    turn_(R.matrices, skew)
    expected = torch.stack([cayley_step(old.double(), S.double()) for old, S in zip(before, skew, strict=True)])
    assert relative_error(R.matrices, expected) <= 20 * eps(dtype) * m


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, log_length=st.floats(3, 30))
def test_turns_that_are_too_long_are_shortened(K: int, m: int, seed: int, log_length: float) -> None:
    sampler = Sampler(seed)
    direction = sampler.skew(K, m)
    direction /= torch.linalg.matrix_norm(direction)[:, None, None]
    R = sampler.rotations(K, m)
    expected = R.clone()
    turn_(R, 10**log_length * direction)
    turn_(expected, MAX_TURN * direction)
    assert_close(R, expected, rtol=0, atol=10 * m * eps(torch.float64) * MAX_TURN**2 / 4)  # the condition of a turn


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_a_turn_repairs_all_columns(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    sampler = Sampler(seed, dtype)
    matrices = 1.0001 * sampler.rotations(K, m)
    turn_(matrices, 0.01 * sampler.skew(K, m))
    assert orthogonality_error(matrices).max() <= 4e-8 + 20 * eps(dtype) * m  # the square of 2e-4


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_haar_start_is_a_rotation(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    assert_rotations(haar(K, m, dtype).matrices)


@pytest.mark.parametrize("seed", range(4))
def test_large_haar_start_is_a_rotation(seed: int) -> None:
    torch.manual_seed(seed)
    assert_rotations(haar(2, 512, torch.float32).matrices)


def test_haar_start_does_not_depend_on_the_sign_of_geotorch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def orthogonal(empty: Tensor) -> Tensor:  # of both signs
        drawn.append(nn.init.orthogonal_(empty))
        return drawn[-1].clone()

    monkeypatch.setattr("rotoopt._rotation.rotations.uniform_init_", orthogonal)
    matrices = haar(20, 4, torch.float64).matrices
    signs = torch.linalg.det(torch.stack(drawn)).sign()
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert_rotations(matrices)
    assert_same_bits(matrices[signs > 0], torch.stack(drawn)[signs > 0])


def test_haar_start_on_several_threads() -> None:
    """With several threads, MKL returns wrong determinants for batches of large matrices."""
    program = """
import torch
from rotoopt._rotation.cayley import determinant_signs
from tests.samplers import haar
torch.set_num_threads(2)
matrices = haar(3, 256, torch.float32).matrices.double()
torch.set_num_threads(1)
signs = [torch.linalg.slogdet(matrix).sign for matrix in matrices]
assert signs == [1.0] * 3, signs
torch.set_num_threads(2)
assert determinant_signs(matrices).tolist() == [1.0] * 3
assert determinant_signs(matrices.flip(2)[..., [1, 0, *range(2, 256)]]).tolist() == [-1.0] * 3
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_haar_start_has_the_moments_of_the_haar_measure() -> None:
    torch.manual_seed(0)
    m, K = 4, 4000
    entries = haar(K, m, torch.float64).matrices
    # Means 0, mean squares 1/m; 5 standard errors, with variances 1/m and below 1/m^2 of the two.
    assert entries.mean(0).abs().max() <= 5 / (m * K) ** 0.5
    assert (entries.square().mean(0) - 1 / m).abs().max() <= 5 / m / K**0.5


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_disabled_rotations_start_at_the_identity(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    off = Sampler(seed).integer(K)
    flags = [task != off for task in range(K)]
    R = Rotations(K, m, rotate=flags, init="haar", device=torch.device("cpu"), dtype=dtype)
    assert torch.equal(R[off], torch.eye(m, dtype=dtype))


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, scale=st.floats(-6, 0))
def test_orthogonality_error_is_its_definition(K: int, m: int, seed: int, scale: float) -> None:
    matrices = torch.eye(m) + 10**scale * Sampler(seed).normal(K, m, m)
    expected = [(M.mT @ M - torch.eye(m)).abs().max() for M in matrices]
    assert_close(orthogonality_error(matrices), torch.stack(expected), rtol=1e-9, atol=1e-14)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_state_dict_creates_missing_rotations(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    saved = haar(K, m, dtype)
    loaded = Rotations(K, None, rotate=(True,) * K, init="identity", device=torch.device("cpu"), dtype=dtype)
    assert saved.state_dict().keys() == {"manifold.base"}
    for _ in range(2):  # the second time, they exist
        turn_(saved.matrices, 0.1 * Sampler(seed, dtype).skew(K, m))
        loaded.load_state_dict(saved.state_dict())
        assert_same_bits(loaded.matrices, saved.matrices)
    loaded.load_state_dict({}, strict=False)  # like a checkpoint made before they existed
    assert_same_bits(loaded.matrices, saved.matrices)


def test_state_dict_without_rotations_creates_none() -> None:
    rotations = Rotations(2, None, rotate=[True, True], init="haar", device=torch.device("cpu"), dtype=torch.float32)
    rotations.load_state_dict({}, strict=False)
    assert rotations.size is None


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES, half=st.sampled_from([torch.float16, torch.bfloat16]))
def test_casts_stop_at_single_precision(K: int, m: int, seed: int, dtype: torch.dtype, half: torch.dtype) -> None:
    torch.manual_seed(seed)
    R = haar(K, m, dtype)
    before = R.matrices.clone()
    assert_same_bits(R.to(torch.float64).matrices, before.double())
    assert_same_bits(R.to(half).matrices, before.float())
    assert R.to("meta", half).matrices.device.type == "meta"
    assert Rotations(K, None, rotate=[True] * K, init="haar", device=before.device, dtype=dtype).to(half).size is None


def test_rotations_that_do_not_exist_yet() -> None:
    rotations = Rotations(2, None, rotate=[True, True], init="haar", device=torch.device("cpu"), dtype=torch.float32)
    message = (
        "^`rotations` must exist before they are read, got none. They are created in the first forward pass "
        "in training mode, which determines their size; pass `rotation_size` to create them at construction.$"
    )
    with pytest.raises(RuntimeError, match=message):
        _ = rotations.matrices
    existing = haar(2, 5, torch.float32).matrices
    rotations.load_matrices(existing)
    assert_same_bits(rotations.matrices, existing)


def test_turns_stay_on_the_device() -> None:
    meta = torch.device("meta")
    rotations = Rotations(2, 4, rotate=[True, True], init="identity", device=meta, dtype=torch.float32)
    turn_(rotations.matrices, torch.zeros(2, 4, 4, device=meta))
    assert rotations.matrices.device == meta


def test_seed_fixes_a_random_start_and_leaves_the_generator_of_torch_alone() -> None:
    def start(seed: int | None) -> Tensor:
        options: dict[str, Any] = {"init": "haar", "device": torch.device("cpu"), "dtype": torch.float64}
        return Rotations(2, 4, rotate=(True, True), seed=seed, **options).matrices

    before = torch.get_rng_state()
    first = start(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(start(3), first)
    assert not torch.equal(start(4), first)
    torch.manual_seed(3)
    drawn = start(None)
    assert not torch.equal(start(None), drawn)  # without a seed, it uses that generator, which advances
    torch.manual_seed(3)
    assert_same_bits(start(None), drawn)


def test_seed_does_not_set_the_generators_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "manual_seed", None)  # which would set them without a reset
    Rotations(2, 4, rotate=[True, True], init="haar", seed=3, device=torch.device("cpu"), dtype=torch.float32)


class Told(Processes):
    """Processes with a shared seed."""

    def shared_seed(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("of_network", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.uint8, torch.float32),
        (torch.complex64, torch.float32),
    ],
)
def test_rotations_like_a_parameter(of_network: torch.dtype, expected: torch.dtype) -> None:
    for device in ("cpu", "meta"):
        param = torch.zeros(2, dtype=of_network, device=device)
        made = Rotations.like(param, 3, 5, rotate=[True, False, True], init="identity", processes=Told())
        assert (made.matrices.dtype, made.matrices.device) == (expected, param.device)
        assert (len(made), made.size, made.rotate, made.init) == (3, 5, (True, False, True), "identity")


def test_processes_draw_the_same_rotations() -> None:
    options: dict[str, Any] = {"rotate": [True, True], "init": "haar"}
    drawn = Rotations.like(torch.zeros(1), 2, 4, processes=Told(), **options)
    same = Rotations(2, 4, seed=3, device=torch.device("cpu"), dtype=torch.float32, **options)
    assert_same_bits(drawn.matrices, same.matrices)
    assert Rotations.like(torch.zeros(1), 2, 4, processes=Told(), **options | {"init": "identity"}).seeds == [
        None,
        None,
    ]


def test_the_default_device_does_not_affect_seeds() -> None:
    with torch.device("meta"):
        R = Rotations(2, None, rotate=(True, True), init="haar", device=torch.device("cpu"), dtype=torch.float32)
    assert all(isinstance(seed, int) for seed in R.seeds)
