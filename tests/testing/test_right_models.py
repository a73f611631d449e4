"""The checks pass on correct models, and do not change them."""

from __future__ import annotations

import pytest
import torch

from rotoopt.testing import check_invariants
from tests.contract.models import assert_same, snapshot
from tests.testing.right_models import RIGHT


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("name", RIGHT)
def test_correct_model_passes_and_is_not_changed(name: str, num_steps: int) -> None:
    wired = RIGHT[name]()
    wired.train(num_steps)
    before, record, random = snapshot(wired.model, wired.optimizer), wired.optimizer.last_step, torch.get_rng_state()
    check_invariants(wired.optimizer, wired.losses)
    assert_same(snapshot(wired.model, wired.optimizer), before)
    assert wired.optimizer.last_step is record
    assert_same(torch.get_rng_state(), random)
    wired.train(1)  # and training can continue
