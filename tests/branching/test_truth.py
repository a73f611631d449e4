r"""In any model, shared parameters get :math:`\sum_k w_k \nabla L_k`, and those of a task its own gradient."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from rotoopt import EqualWeighting, GradNorm, ProgressWeighting, RotoGradWeighting
from rotoopt.testing._branching import BRANCHING
from rotoopt.testing._branching.model import Sizes
from rotoopt.testing.strategies import model_sizes
from tests.branching.twins import NAMES, TOLERANCE, WAYS, Make, Twins
from tests.samplers import DTYPES, SEEDS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
FEW = settings(max_examples=settings().max_examples // 4)  # of each model
MODELS = pytest.mark.parametrize("make", BRANCHING, ids=NAMES)
SIZES = model_sizes()
LOG_SCALES = st.lists(st.floats(-3, 3), min_size=3, max_size=3)
BATCHES = st.integers(2, 5)


@MODELS
@FEW
@given(seed=SEEDS, dtype=DTYPES, sizes=SIZES, log_scales=LOG_SCALES, size=BATCHES, data=st.data())
def test_shared_parameters_get_the_weighted_sum_of_the_gradients(
    make: Make, seed: int, dtype: torch.dtype, sizes: Sizes, log_scales: list[float], size: int, data: DataObject
) -> None:
    twins = Twins.of(make, seed, dtype, sizes, log_scales)
    for step in range(2):
        way = WAYS[data.draw(st.sampled_from(sorted(WAYS)))]
        x = twins.batch(seed + step, size)
        twins.follow()
        twins.optimizer.zero_grad()
        way(twins.optimizer, twins.losses(x, step))
        weights = twins.weights()
        parts = [(weights[task], twins.true_gradients(x, step, task)) for task in weights]
        twins.assert_gradients(parts, TOLERANCE[dtype])
        twins.optimizer.step()


@MODELS
@FEW
@given(seed=SEEDS, dtype=DTYPES, log_scales=LOG_SCALES, way=st.sampled_from(sorted(WAYS)))
def test_weights_equalize_the_gradient_norms(
    make: Make, seed: int, dtype: torch.dtype, log_scales: list[float], way: str
) -> None:
    """The norms of the same step, or of the previous one if ``last_step.lagged``; then the first weights are one."""
    twins = Twins.of(make, seed, dtype, log_scales=log_scales, weighting=RotoGradWeighting())
    norms: dict[str, float] = {}
    for step in range(3):
        x = twins.batch(seed + step)
        twins.follow()
        twins.optimizer.zero_grad()
        WAYS[way](twins.optimizer, twins.losses(x, step))
        record, weights, before = twins.optimizer.last_step, twins.weights(), norms
        assert record is not None
        norms = {task: twins.true_norm(x, step, task) for task in weights}
        tolerance = 10 * TOLERANCE[dtype]  # of one norm, not relative to a sum
        for task, norm in zip(weights, record.grad_norms.tolist(), strict=True):
            assert norm == pytest.approx(norms[task], rel=tolerance)
        used = before if record.lagged else norms
        if used:
            common = [weights[task] * used[task] for task in weights]
            assert common == pytest.approx([common[0]] * len(common), rel=tolerance)
            assert min(used.values()) <= common[0] * (1 + tolerance)
            assert common[0] <= max(used.values()) * (1 + tolerance)
        else:
            assert set(weights.values()) == {1.0}
        twins.optimizer.step()


@MODELS
@FEW
@given(seed=SEEDS, dtype=DTYPES, log_scales=LOG_SCALES, data=st.data())
def test_any_tasks_in_a_backward_pass(
    make: Make, seed: int, dtype: torch.dtype, log_scales: list[float], data: DataObject
) -> None:
    """All or some of them, in one pass or one pass each, and with other tasks in the next step."""
    twins = Twins.of(make, seed, dtype, log_scales=log_scales)
    names = sorted(twins.wrapped.heads)
    for step in range(3):
        twins.follow()
        twins.optimizer.zero_grad()
        parts = []
        for number in range(data.draw(st.integers(1, 3))):
            tasks = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            batch = twins.batch(seed + 10 * step + number)
            way = WAYS[data.draw(st.sampled_from(sorted(WAYS)))]
            way(twins.optimizer, twins.losses(batch, number, tasks))
            weights = twins.weights()
            parts += [(weights[task], twins.true_gradients(batch, number, task)) for task in tasks]
        twins.assert_gradients(parts, TOLERANCE[dtype])
        twins.optimizer.step()


@MODELS
@FEW
@given(seed=SEEDS, log_scales=LOG_SCALES, way=st.sampled_from(sorted(WAYS)), together=st.booleans())
def test_a_batch_per_task_is_weighted_like_a_joint_batch(
    make: Make, seed: int, log_scales: list[float], way: str, together: bool
) -> None:
    """One step for all backward passes, or one each: without updates, the weights converge to those of a joint pass."""
    weights = []
    for alone in (True, False):
        twins = Twins.of(make, seed, log_scales=log_scales, burn_in_period=0)
        for group in twins.optimizer.param_groups:
            group["lr"] = 0.0
        x, names = twins.batch(seed), list(twins.wrapped.heads)
        latest: dict[str, float] = {}
        for _ in range(4):
            for tasks in [[name] for name in names] if alone else [names]:
                WAYS[way](twins.optimizer, twins.losses(x, 0, tasks))
                latest.update({task: weight for task, weight in twins.weights().items() if task in tasks})
                if not together:
                    twins.optimizer.step()
                    twins.optimizer.zero_grad()
            if together:
                twins.optimizer.step()
                twins.optimizer.zero_grad()
        weights.append([latest[name] for name in names])
    assert weights[0] == pytest.approx(weights[1], rel=1e-6)


def test_page_lists_the_models() -> None:
    _, _, section = PAGE.read_text(encoding="utf-8").partition("## Shapes of models")
    rows = re.findall(r"^\|[^|]*\| (`[a-z_`, ]*`) \|$", section, re.MULTILINE)
    assert {name.strip("`") for row in rows for name in row.split(", ")} == set(NAMES)


@MODELS
@pytest.mark.parametrize("weighting", [EqualWeighting, GradNorm, ProgressWeighting, RotoGradWeighting])
def test_any_weighting_that_adds_up(make: Make, weighting: type) -> None:
    twins = Twins.of(make, 0, weighting=weighting(), turn_every=1)
    for step in range(3):
        x = twins.batch(step)
        twins.follow()
        twins.optimizer.zero_grad()
        twins.optimizer.backward(twins.losses(x, step))
        weights = twins.weights()
        parts = [(weights[task], twins.true_gradients(x, step, task)) for task in weights]
        twins.assert_gradients(parts, TOLERANCE[torch.float64])
        twins.optimizer.step()
