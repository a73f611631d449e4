"""The unseen problems of the benchmarks: every loss reaches its own head alone, and the table has the right numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rotoopt import EqualWeighting, RotoGradOptimizer
from rotoopt.comparison import Comparison
from tests.benchmarks.unseen import PROBLEMS, Problem, __main__
from tests.benchmarks.unseen.digits import FineTuning
from tests.benchmarks.unseen.parts import rank_error
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
    variants = {"default, rotate=False": same, "default, alpha=1/2": same, "default, alpha=1": half}
    runs = {PLAIN_SUM: plain, "default": half, **variants}
    table = markdown({"graphs": comparison(runs), "many tasks": comparison({**runs, "default": same, UPGRAD: half})})
    cells = [[cell.strip() for cell in line.split("|")[1:-2]] for line in table.splitlines()]
    zero, twice = "+0.000 ± 0.000", "+69.3 ± 0.0"
    assert cells[0] == ["problem", "default", *variants, UPGRAD]
    assert cells[2] == ["graphs", twice, zero, zero, twice, "-"]
    assert cells[3] == ["many tasks", zero, zero, zero, twice, twice]
    assert cells[4] == ["mean over problems", "+34.7 ± 34.7", zero, zero, twice, "+69.3 (1 of 2)"]


def test_command_prints_a_table_of_each_group_with_chosen_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    same = [[1.0, 1.0], [1.0, 1.0]]
    made = comparison(dict.fromkeys([PLAIN_SUM, "default", "default, rotate=False"], same))
    monkeypatch.setattr(__main__, "results", lambda *_: made)
    command = ["unseen", "--out", str(tmp_path), "--problems"]
    monkeypatch.setattr("sys.argv", [*command, "languages", "graphs", "scenes"])
    __main__.main()
    ten, six = capsys.readouterr().out.split("Six later problems")
    assert ten.startswith("Ten problems")
    assert [name in ten for name in ("graphs", "languages", "scenes", "scales")] == [True, False, False, False]
    assert [name in six for name in ("graphs", "languages", "scenes", "patients")] == [False, True, True, False]

    monkeypatch.setattr("sys.argv", [*command, "patients"])
    __main__.main()
    assert "Ten problems" not in capsys.readouterr().out


@given(
    pairs=st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=30, unique_by=lambda pair: pair[0])
)
def test_rank_error_is_the_share_of_pairs_in_the_wrong_order(pairs: list[tuple[float, bool]]) -> None:
    positives, negatives = ([score for score, of in pairs if of == label] for label in (True, False))
    scores, labels = torch.tensor([score for score, _ in pairs], dtype=torch.float64), [of for _, of in pairs]
    found = rank_error(scores, torch.tensor(labels).float())
    wrong = [positive < negative for positive in positives for negative in negatives]
    assert found == pytest.approx(sum(wrong) / len(wrong) if wrong else 1.0)
