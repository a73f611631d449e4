"""Cayley updates: the low-rank and the dense form, and that they agree."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rotoopt._rotation.cayley import DenseSkew, SampleSkew, cayley_delta
from tests.asserts import assert_rotations, assert_same_bits, eps, relative_error
from tests.oracle import cayley_step
from tests.samplers import DTYPES, NUM_SAMPLES, NUM_TASKS, SEEDS, SIZES, SKEW_SCALES, Sampler, Turn

TURNS = st.builds(Turn, NUM_TASKS, SIZES, NUM_SAMPLES, SEEDS)
# Products of unit matrices, each a sum over up to 24 numbers: largest error in 1500 seeds 3.5 eps.
ROUNDING = 40


@given(m=SIZES, seed=SEEDS, scale=SKEW_SCALES)
def test_cayley_delta_is_the_textbook_inverse(m: int, seed: int, scale: float) -> None:
    skew = 10**scale * Sampler(seed).skew(m)
    identity = torch.eye(m, dtype=torch.float64)
    expected = torch.linalg.solve(identity - skew / 2, skew)
    # Solving with I + S'S/4 amplifies errors by its condition number, below 1 + |S|^2 / 4.
    rtol = 10 * m * eps(torch.float64) * (1 + float(torch.linalg.matrix_norm(skew, 2)) ** 2 / 4)
    assert relative_error(cayley_delta(skew), expected) <= rtol


@given(m=SIZES, seed=SEEDS, scale=st.floats(-30, -9))
def test_cayley_delta_of_a_small_turn_is_the_turn(m: int, seed: int, scale: float) -> None:
    skew = 10**scale * Sampler(seed, torch.float32).skew(m)
    # Z = S + S^2/2 + ..., of which float32 resolves only the first term. I + Z would be equal to I.
    assert relative_error(cayley_delta(skew), skew) <= 10 * eps(torch.float32)


@given(K=NUM_TASKS, m=SIZES, n=NUM_SAMPLES, seed=SEEDS, dtype=DTYPES)
def test_low_rank_and_dense_are_the_textbook_turn(K: int, m: int, n: int, seed: int, dtype: torch.dtype) -> None:
    turn = Turn(K, m, n, seed, dtype)
    S = turn.step[:, None, None].double() * turn.S.double()
    expected = torch.stack(list(map(cayley_step, turn.R.double(), S)))
    for turned in (turn.low_rank(), turn.dense()):
        assert_close(turned.double(), expected, rtol=0, atol=ROUNDING * eps(dtype))


@given(turn=TURNS, seed=SEEDS)
def test_way_up_in_a_metric(turn: Turn, seed: int) -> None:
    S, root = turn.S, Sampler(seed).normal(turn.R.shape[-1], turn.R.shape[-1])
    G = root @ root.mT + torch.eye(len(root))
    D = G.inverse() @ S @ G.inverse()
    for skew in (SampleSkew(turn.W, turn.V), DenseSkew(turn.W @ turn.V.mT)):
        ascent = skew.in_metric(G)
        assert_close(ascent.skew.half_squared_norm(), D.square().sum((1, 2)) / 2, rtol=0, atol=1e-11)
        assert_close(ascent.rise, (S * D).sum((1, 2)), rtol=0, atol=1e-11)
        assert_close(ascent.change, (D @ G @ D.mT).diagonal(dim1=1, dim2=2).sum(1), rtol=0, atol=1e-11)
        step, R = torch.minimum(turn.step, ascent.skew.half_squared_norm().rsqrt()), turn.R.clone()
        ascent.skew.turn_(R, step)
        expected = torch.stack(list(map(cayley_step, turn.R, step[:, None, None] * D)))
        assert_close(R, expected, rtol=0, atol=1e-11)


@given(turn=TURNS)
def test_gram_identities(turn: Turn) -> None:
    W, V, S = turn.W, turn.V, turn.S
    for skew in (SampleSkew(W, V), DenseSkew(W @ V.mT)):
        # The norm is a difference of products of norms, at most 1: for small S, it is a rounding error.
        assert_close(skew.half_squared_norm(), S.square().sum((1, 2)) / 2, rtol=0, atol=ROUNDING * eps(W.dtype))
        assert (skew.half_squared_norm() >= 0).all()
    # No plane turns by more than |S|_F / sqrt(2), and a step below 1 / (|W| |V|) is one below 1 / |N|.
    spectral = torch.linalg.matrix_norm(S, 2)
    assert (spectral <= (S.square().sum((1, 2)) / 2).sqrt() + 1e-12).all()
    assert (torch.linalg.matrix_norm(W @ V.mT, 2) <= W.norm(dim=(1, 2)) * V.norm() + 1e-12).all()


@given(turn=TURNS, power=st.integers(-40, 40))
def test_scale_of_a_task_is_that_of_its_norm_and_of_no_other(turn: Turn, power: int) -> None:
    scales = torch.ones(len(turn.R)).double()
    scales[0] = 2.0**power  # which changes no bit
    scaled = turn.but(W=turn.W * scales[:, None, None])
    for form in (SampleSkew, lambda W, V: DenseSkew(W @ V.mT)):
        expected = scales.square() * form(turn.W, turn.V).half_squared_norm()
        assert_same_bits(form(scaled.W, scaled.V).half_squared_norm(), expected)


@given(turn=TURNS)
def test_equivariance(turn: Turn) -> None:
    """Rotating the inputs or the outputs of a rotation rotates the new rotation in the same way."""
    Q = Sampler(1).rotations(1, turn.R.shape[-1])[0]
    for form in ("low_rank", "dense"):
        expected = getattr(turn, form)()
        seen = turn.but(R=turn.R @ Q.mT, W=Q @ turn.W, V=Q @ turn.V)
        assert_close(getattr(seen, form)(), expected @ Q.mT, rtol=0, atol=1e-13)
        made = turn.but(R=Q @ turn.R)
        assert_close(getattr(made, form)(), Q @ expected, rtol=0, atol=1e-13)


@given(turn=TURNS, share=st.floats(-1, 2))
def test_samples_can_be_permuted_split_scaled_and_padded(turn: Turn, share: float) -> None:
    W, V, n = turn.W, turn.V, turn.V.shape[1]
    order, zeros = torch.randperm(n), torch.zeros_like(V)
    factors = Sampler(2).log_scales(n, -3, 3)
    same = [
        turn.but(W=W[:, :, order], V=V[:, order]),
        turn.but(W=torch.cat([share * W, (1 - share) * W], dim=2), V=torch.cat([V, V], dim=1)),
        turn.but(W=W / factors, V=V * factors),
        turn.but(W=torch.cat([W, W], dim=2), V=torch.cat([V, zeros], dim=1)),
        turn.but(W=torch.cat([W, torch.zeros_like(W)], dim=2), V=torch.cat([V, zeros], dim=1)),
    ]
    for each in same:
        assert_close(each.low_rank(), turn.low_rank(), rtol=0, atol=1e-12)
        assert_close(each.dense(), turn.dense(), rtol=0, atol=1e-12)


@given(turn=TURNS)
def test_no_motion_off_the_span_and_rank_of_the_change(turn: Turn) -> None:
    n = turn.V.shape[1]
    turned = turn.low_rank()
    for k, (before, after) in enumerate(zip(turn.R, turned, strict=True)):
        basis = torch.cat([turn.W[k], turn.V], dim=1)
        left, values, _ = torch.linalg.svd(basis)
        off = left[:, int((values > 1e-12 * values.max()).sum()) :]
        assert_close(after @ off, before @ off, rtol=0, atol=1e-13)
        assert (torch.linalg.svdvals(after - before)[2 * n :] <= 1e-13).all()


@given(turn=TURNS)
def test_reversal(turn: Turn) -> None:
    for form in ("low_rank", "dense"):
        back = turn.but(R=getattr(turn, form)(), step=-turn.step)
        assert_close(getattr(back, form)(), turn.R, rtol=0, atol=1e-13)


@given(seed=SEEDS, n=NUM_SAMPLES)
def test_angle_in_the_plane(seed: int, n: int) -> None:
    turn = Turn(3, 2, n, seed)
    s = turn.step * (turn.W[:, 1] * turn.V[0] - turn.W[:, 0] * turn.V[1]).sum(1)  # S = s (0 -1; 1 0)
    for turned in (turn.low_rank(), turn.dense()):
        relative = turn.R.mT @ turned
        assert_close(torch.atan2(relative[:, 1, 0], relative[:, 0, 0]), 2 * (s / 2).atan(), rtol=0, atol=1e-14)


@given(turn=TURNS)
def test_batch_is_a_loop(turn: Turn) -> None:
    for form in ("low_rank", "dense"):
        one_by_one = [
            getattr(turn.but(R=turn.R[k : k + 1], W=turn.W[k : k + 1], step=turn.step[k : k + 1]), form)()
            for k in range(len(turn.R))
        ]
        # Batched products may use another order of summation than single ones.
        assert_close(torch.cat(one_by_one), getattr(turn, form)(), rtol=0, atol=1e-14)


@given(turn=TURNS)
def test_shared_target_is_an_expanded_one_and_strides_do_not_matter(turn: Turn) -> None:
    expected = turn.low_rank()
    W = torch.stack([turn.W, turn.W], dim=-1)[..., 0]
    V = turn.V.mT.contiguous().mT
    assert_close(turn.but(W=W, V=V).low_rank(), expected, rtol=0, atol=1e-14)
    for k in range(len(turn.R)):
        alone = SampleSkew(turn.W[k].expand(len(turn.R), -1, -1), turn.V)
        R = turn.R.clone()
        alone.turn_(R, turn.step)
        assert_close(R[k], expected[k], rtol=0, atol=1e-14)


@given(turn=TURNS)
def test_only_the_rotations_change_and_in_place(turn: Turn) -> None:
    W, V, step, R = turn.W.clone(), turn.V.clone(), turn.step.clone(), turn.R.clone()
    storage = R.data_ptr()
    for skew in (SampleSkew(turn.W, turn.V), DenseSkew(turn.W @ turn.V.mT)):
        skew.turn_(R, turn.step)
    assert R.data_ptr() == storage
    for now, then in ((turn.W, W), (turn.V, V), (turn.step, step)):
        assert_same_bits(now, then)


@given(K=NUM_TASKS, m=SIZES, n=NUM_SAMPLES, seed=SEEDS, dtype=DTYPES)
def test_zero_step_keeps_every_bit(K: int, m: int, n: int, seed: int, dtype: torch.dtype) -> None:
    turn = Turn(K, m, n, seed, dtype)
    still = seed % K
    turn.step[still] = 0
    for turned in (turn.low_rank(), turn.dense()):
        assert_same_bits(turned[still], turn.R[still])


@given(K=NUM_TASKS, m=SIZES, n=NUM_SAMPLES, seed=SEEDS, dtype=DTYPES)
def test_a_turn_gives_rotations(K: int, m: int, n: int, seed: int, dtype: torch.dtype) -> None:
    turn = Turn(K, m, n, seed, dtype)
    for turned in (turn.low_rank(), turn.dense()):
        assert_rotations(turned)


THREADS = """
import torch
from tests.oracle import cayley_step
from tests.samplers import Turn
turn = Turn(2, 256, {samples}, 0, torch.float32)
S = turn.step[:, None, None].double() * turn.S.double()
wanted = torch.stack(list(map(cayley_step, turn.R.double(), S)))
torch.set_num_threads(2)
for turned in (turn.low_rank(), turn.dense()):
    print(float((turned.double() - wanted).abs().max()))
"""


@pytest.mark.parametrize("samples", [8, 100])
def test_turns_are_correct_with_two_threads(samples: int) -> None:
    # In a separate process: on the CPU build of torch 2.13, batched LU is wrong or hangs afterwards.
    code = THREADS.format(samples=samples)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    errors = [float(line) for line in run.stdout.split()]
    assert len(errors) == 2
    assert max(errors) <= ROUNDING * eps(torch.float32)
