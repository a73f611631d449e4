"""The unseen problems of the benchmarks: every loss reaches its own head alone, and the table has the right numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from rotoopt import EqualWeighting, RotoGradOptimizer
from rotoopt.comparison import Comparison
from tests.benchmarks.unseen import PROBLEMS, Problem
from tests.benchmarks.unseen.digits import FineTuning
from tests.benchmarks.unseen.table import log_changes, markdown
from tests.benchmarks.unseen.training import METHODS, PLAIN_SUM, UPGRAD, methods, train


@pytest.fixture(autouse=True)
def short_pretraining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FineTuning, "num_pretraining", 2)


def parameters(problem: Problem) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of every head."""
    heads = {name: head if isinstance(head, tuple) else (head,) for name, head in problem.heads_by_task.items()}
    return {name: [*nn.ModuleList(modules).parameters()] for name, modules in heads.items()}


def all_losses(problem: Problem) -> Mapping[str, Tensor]:
    """Draw batches until all tasks have a loss."""
    while True:
        losses = {name: loss for name, loss in problem.losses().items() if loss is not None}
        if len(losses) == len(problem.heads_by_task):
            return losses


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_loss_reaches_its_own_head_alone_and_a_step_leaves_finite_errors(name: str) -> None:
    problem = PROBLEMS[name](0)
    heads, losses = parameters(problem), all_losses(problem)
    assert list(losses) == list(heads)
    for task, loss in losses.items():
        assert loss.isfinite()
        for other, of_head in heads.items():
            grads = torch.autograd.grad(loss, of_head, retain_graph=True, allow_unused=True)
            reached = [grad is not None and bool(grad.isfinite().all() & grad.any()) for grad in grads]
            assert reached == [task == other] * len(of_head), other

    optimizer = RotoGradOptimizer(problem.optimizer(), problem.heads_by_task, dim=problem.dim)
    optimizer.step(all_losses(problem))
    with torch.no_grad():
        errors = problem.errors()
    assert tuple(errors) == problem.metrics
    assert all(math.isfinite(error) for error in errors.values())


@pytest.mark.parametrize("name", PROBLEMS)
def test_aggregators_are_omitted_if_several_tensors_enter_the_heads(name: str) -> None:
    problem = PROBLEMS[name](0)
    optimizer = RotoGradOptimizer(problem.optimizer(), problem.heads_by_task, dim=problem.dim, **METHODS[UPGRAD])
    refused = pytest.raises(RuntimeError, match="must see the gradients of all tasks at one tensor")
    with nullcontext() if UPGRAD in methods(name) else refused:
        optimizer.step(all_losses(problem))


def plain_sum(problem: Problem) -> dict[str, float]:
    """Train as a user would without the package."""
    optimizer = problem.optimizer()
    scheduler = problem.scheduler(optimizer)
    for _ in range(problem.num_steps):
        optimizer.zero_grad()
        torch.stack([loss for loss in problem.losses().values() if loss is not None]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if scheduler:
            scheduler.step()
    with torch.no_grad():
        return problem.errors()


@pytest.mark.parametrize("name", ["transformer", "detection"])  # with a scheduler; with a task without labels
def test_plain_sum_is_an_ordinary_loop_and_equal_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROBLEMS[name], "num_steps", 5)
    plain = plain_sum(PROBLEMS[name](0))
    torch.testing.assert_close(train(name, 0, plain=True), plain)
    torch.testing.assert_close(train(name, 0, rotate=False, weighting=EqualWeighting()), plain)
    assert train(name, 1, plain=True) != plain


def comparison(errors: Mapping[str, list[list[float]]]) -> Comparison:
    """Make a comparison of ``(seeds, 2)`` errors of each method."""
    metrics = {
        name: dict(zip("ab", torch.tensor(of, dtype=torch.float64).T, strict=True)) for name, of in errors.items()
    }
    return Comparison(metrics, {"a": False, "b": False}, seeds=(0, 1), baseline=PLAIN_SUM)


def test_changes_are_paired_clipped_and_positive_if_errors_are_lower() -> None:
    plain = [[1.0, 2.0], [4.0, 0.0]]
    made = comparison({PLAIN_SUM: plain, "default": [[0.5, 2.0], [400.0, 0.0]], "other": [[math.nan, 2.0], [1.0, 1.0]]})
    torch.testing.assert_close(
        log_changes(made, "default"), torch.tensor([50 * math.log(2), -50.0], dtype=torch.float64)
    )
    assert log_changes(made, "other").tolist() == [-50.0, 0.0]
    assert log_changes(made, UPGRAD).isnan().all()


def test_table_has_means_over_seeds_and_over_problems() -> None:
    plain = [[1.0, 1.0], [1.0, 1.0]]
    half, same = [[0.5, 0.5], [0.5, 0.5]], plain
    runs = {PLAIN_SUM: plain, "default": half, "default, rotate=False": same}
    table = markdown({"graphs": comparison(runs), "many tasks": comparison({**runs, "default": same, UPGRAD: half})})
    cells = [[cell.strip() for cell in line.split("|")[1:-2]] for line in table.splitlines()]
    assert cells[0] == ["problem", "default", "default, rotate=False", UPGRAD]
    assert cells[2] == ["graphs", "+69.3 ± 0.0", "+0.000 ± 0.000", "-"]
    assert cells[3] == ["many tasks", "+0.000 ± 0.000", "+0.000 ± 0.000", "+69.3 ± 0.0"]
    assert cells[4] == ["mean over problems", "+34.7 ± 34.7", "+0.000 ± 0.000", "+69.3 (1 of 2)"]
