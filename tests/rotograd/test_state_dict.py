"""State dicts of the official package: rotations are found with any prefix, and loaded into this package."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rotoopt.rotograd import RotoGradNorm, rotations_from_rotograd
from tests.asserts import assert_rotations, eps, relative_error
from tests.contract.models import assert_same
from tests.samplers import DTYPES, NUM_TASKS, SEEDS, SIZES, haar

PREFIXES = st.sampled_from(["", "model.", "rotograd.0."])


def official(K: int, m: int, seed: int, dtype: torch.dtype, prefix: str) -> dict[str, Tensor]:
    """Return the state dict of the parameters of the official package."""
    torch.manual_seed(seed)
    entries = {f"{prefix}weight_.{task}": torch.rand((), dtype=dtype) for task in range(K)}
    for task, base in enumerate(haar(K, m, dtype).matrices):
        name = f"{prefix}parametrizations.rotation_{task}"
        entries |= {f"{name}.original": torch.randn(m, m, dtype=dtype), f"{name}.0.base": base}
    return entries


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES, prefix=PREFIXES)
def test_rotation_is_base_times_exponential_of_the_lower_triangle(
    K: int, m: int, seed: int, dtype: torch.dtype, prefix: str
) -> None:
    saved = official(K, m, seed, dtype, prefix)
    found = rotations_from_rotograd(saved, prefix) if prefix else rotations_from_rotograd(saved)
    assert found.dtype == dtype
    assert len(found) == K
    assert_rotations(found)
    for task, matrix in enumerate(found):
        name = f"{prefix}parametrizations.rotation_{task}"
        original, base = saved[f"{name}.original"].double(), saved[f"{name}.0.base"].double()
        i, j = torch.tril_indices(m, m, -1)
        skew = torch.zeros(m, m, dtype=torch.float64)
        skew[i, j], skew[j, i] = original[i, j], -original[i, j]
        # Rounded once, from float64, where the exponential is the sum of some twenty products of m terms each.
        # As a batch: of a single matrix of small norm, torch has eleven digits (pytorch#196592).
        expected = base @ torch.matrix_exp(skew.expand(2, m, m))[0]
        assert relative_error(matrix, expected) <= eps(dtype) + 20 * m * eps(torch.float64)


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, dtype=DTYPES)
def test_every_model_loads_its_own_rotations(K: int, m: int, seed: int, dtype: torch.dtype) -> None:
    """For models inside of another one, whose names have a common prefix."""
    saved: dict[str, Tensor] = {}
    models = nn.ModuleDict()
    for number, name in enumerate(("part", "part2")):
        backbone, heads = nn.Linear(2, m, dtype=dtype), [nn.Linear(m, 1, dtype=dtype) for _ in range(K + number)]
        models[name] = RotoGradNorm(backbone, heads, m, alpha=1.0)
        saved |= official(K + number, m, seed + number, dtype, f"{name}.")
    keys = list(saved)
    result = models.load_state_dict(saved, strict=False)
    assert list(saved) == keys
    assert result.unexpected_keys == []
    assert not any(".weight_" in key for key in result.missing_keys)
    for number, (name, model) in enumerate(models.items()):
        assert isinstance(model, RotoGradNorm)
        assert_same(torch.stack(list(model.rotation)), rotations_from_rotograd(saved, f"{name}."))
        weights = [saved[f"{name}.weight_.{task}"] for task in range(K + number)]
        assert_same(model.weight_.detach(), torch.stack(weights).to(model.weight_.dtype))


@given(K=NUM_TASKS, m=SIZES, seed=SEEDS, prefix=PREFIXES)
def test_state_dicts_without_rotations_are_an_error(K: int, m: int, seed: int, prefix: str) -> None:
    saved = official(K, m, seed, torch.float64, f"another.{prefix}")
    message = f"The state dict must be one of rotograd, with '{prefix}parametrizations.rotation_0.original', got keys "
    with pytest.raises(ValueError, match=re.escape(f"{message}{list(saved)[:3]}. Give the prefix, if the model was")):
        rotations_from_rotograd(saved, prefix)
