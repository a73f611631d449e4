"""Autocast, checkpointing, compile, accumulation and saved states work with any model."""

from __future__ import annotations

import io
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rotoopt.testing import check_invariants
from rotoopt.testing._branching import BRANCHING
from tests.branching.twins import NAMES, TOLERANCE, WAYS, Make, Twins
from tests.contract.models import assert_same

MODELS = pytest.mark.parametrize("make", BRANCHING, ids=NAMES)


def check_step(twins: Twins, x: Tensor, losses: dict[str, Tensor], tolerance: float) -> None:
    """Back-propagate, compare with the twin, and step."""
    twins.follow()
    twins.optimizer.zero_grad()
    twins.optimizer.backward(losses)
    weights = twins.weights()
    parts = [(weights[task], twins.true_gradients(x, 0, task)) for task in weights]
    twins.assert_gradients(parts, tolerance)
    twins.optimizer.step()


@MODELS
def test_autocast(make: Make) -> None:
    """Gradients have the rounding of bfloat16, with eight bits."""
    twins = Twins.of(make, 0, torch.float32)
    for step in range(3):
        x = twins.batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = {name: loss.float() for name, loss in twins.losses(x, 0).items()}
        check_step(twins, x, losses, 0.05)


@MODELS
def test_activation_checkpointing(make: Make) -> None:
    """Around the whole model: heads run again in the backward pass."""
    twins = Twins.of(make, 0)
    for step in range(3):
        x = twins.batch(step).requires_grad_()
        torch.manual_seed(0)
        losses = checkpoint(twins.wrapped.losses, x, use_reentrant=False)
        check_step(twins, x, losses, TOLERANCE[torch.float64])


@MODELS
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # which torch hides by itself
def test_compiled_model(make: Make) -> None:
    twins = Twins.of(make, 0, torch.float32)
    compiled = torch.compile(twins.wrapped.losses, backend="eager")
    for step in range(2):
        x = twins.batch(step)
        torch.manual_seed(0)
        check_step(twins, x, compiled(x), TOLERANCE[torch.float32])
    torch._dynamo.reset()


# A loss is computed between two heads, and compiled into one graph with what enters the second one.
INTERLEAVED = ["cast_per_head", "auxiliary_head", "variational", "nodes_and_graph", "other_sizes"]


@pytest.mark.parametrize("name", [*INTERLEAVED, "one_tensor"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_graphs_of_several_outputs(name: str) -> None:
    """As of all backends that compile the backward pass, too."""
    twins = Twins.of(BRANCHING[NAMES.index(name)], 0, torch.float32)
    compiled = torch.compile(twins.wrapped.losses, backend="aot_eager")
    with pytest.warns(UserWarning, match="The wiring must be visible") if name in INTERLEAVED else nullcontext():
        for step in range(3):
            x = twins.batch(step)
            torch.manual_seed(0)
            check_step(twins, x, compiled(x), TOLERANCE[torch.float32])
    torch._dynamo.reset()


@MODELS
@pytest.mark.parametrize("way", WAYS)
def test_accumulation_and_a_resumed_run(make: Make, way: str) -> None:
    """Several backward passes per step; a run that is saved and resumed is bit-identical."""
    results = []
    for resume in (False, True):
        twins = Twins.of(make, 0, torch.float32)
        for step in range(6):
            if resume and step == 3:
                saved = io.BytesIO()
                torch.save([twins.wrapped.modules().state_dict(), twins.optimizer.state_dict()], saved)
                saved.seek(0)
                model_state, state = torch.load(saved, weights_only=True)
                twins = Twins.of(make, 1, torch.float32)
                twins.wrapped.modules().load_state_dict(model_state)
                twins.optimizer.load_state_dict(state)
            twins.optimizer.zero_grad()
            for micro_batch in range(2):
                WAYS[way](twins.optimizer, twins.losses(twins.batch(10 * step + micro_batch), step))
            twins.optimizer.step()
        results.append([twins.wrapped.modules().state_dict(), twins.optimizer.state_dict()])
    assert_same(*results)


@MODELS
def test_evaluation_before_and_between_training_steps(make: Make) -> None:
    """Predictions equal those of the twin, in any order of calls."""
    twins = Twins.of(make, 0)
    for step in range(3):
        twins.follow()
        twins.wrapped.modules().eval()
        twins.bare.modules().eval()
        with torch.no_grad():
            x = twins.batch(step)
            torch.manual_seed(0)
            evaluated = twins.wrapped.losses(x)
            torch.manual_seed(0)
            assert_same(evaluated, twins.bare.losses(x))
        twins.wrapped.modules().train()
        twins.bare.modules().train()
        check_step(twins, x, twins.losses(x, 0), TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["nested_inputs", "list_of_levels", "keyword_attention_heads", "other_sizes"])
def test_evaluation_is_one_graph(name: str) -> None:
    twins = Twins.of(BRANCHING[NAMES.index(name)], 0, torch.float32, init="haar")
    x = twins.batch(0)
    twins.wrapped.losses(x)  # makes the rotations
    twins.wrapped.modules().eval()
    with torch.no_grad():
        compiled = torch.compile(twins.wrapped.losses, backend="eager", fullgraph=True)
        assert_same(compiled(x), twins.wrapped.losses(x))


@MODELS
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("init", ["identity", "haar"])
def test_invariants(make: Make, steps: int, init: str) -> None:
    twins = Twins.of(make, 0, init=init)
    x = twins.batch(0)
    for _ in range(steps):
        twins.optimizer.zero_grad()
        twins.optimizer.step(twins.losses(x, 0))
    check_invariants(twins.optimizer, lambda: twins.losses(x, 0))
