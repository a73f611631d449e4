"""compare(): wrong arguments, results and files are errors, before anything runs or changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rotoopt import GradNorm, RotoGradOptimizer
from tests.comparison.compared import compared
from tests.comparison.trainings import make_network


def used() -> GradNorm:
    weighting = GradNorm()
    backbone, heads = make_network()
    RotoGradOptimizer(torch.optim.SGD(backbone.parameters(), lr=0.1), heads, weighting=weighting)
    return weighting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": {}}, r"^`candidates` must have at least one entry, got none\.$"),
        (
            {"candidates": {"a": {"weighting": used()}}},
            r"^`candidates\['a'\]` must have a weighting of its own, got a GradNorm that an optimizer uses. Make a new "
            "GradNorm; every run gets a copy of it.$",
        ),
        ({"higher_is_better": {}}, r"one bool per metric, got \{\}"),
        ({"higher_is_better": {"left": 1}}, r"one bool per metric, got \{'left': 1\}"),
        ({"seeds": 0}, r"`seeds` must be a positive number, or different seeds, got \[\]"),
        ({"seeds": [1, 1]}, r"different seeds, got \[1, 1\]"),
        ({"baseline": "sum"}, "one of the candidates, plain sum, two, half, or a number for every metric, got 'sum'"),
        ({"baseline": {"left": 1.0}}, "a number for every metric, left, right, got left"),
        ({"baseline": {"left": 1.0, "up": 1.0}}, r"for every metric, left, right, got left, up\.$"),
        ({"baseline": {}}, r"for every metric, left, right, got none\.$"),
        ({"processes": 0}, "`processes` must be at least 1, got 0"),
        ({"lrs": []}, r"`lrs` must be different positive learning rates, got \[\]"),
        ({"lrs": [0.1, 0.1]}, "different positive learning rates"),
        ({"lrs": [-0.1]}, "different positive learning rates"),
        ({"lrs": [0.0]}, "different positive learning rates"),
        ({"lrs": [0.1], "search_seeds": [2, 3]}, r"that the comparison does not use, got \[2, 3\] beside \[0, 1, 2\]"),
        ({"lrs": [0.1], "search_seeds": []}, "that the comparison does not use"),
    ],
)
def test_bad_arguments_are_rejected_before_anything_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compared(lambda seed, **options: pytest.fail("ran"), **options)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.5, r"`train` must return a dict of metrics, got 0.5. .*, with the names of `higher_is_better`\.\n"),
        ({"left": 1.0}, "the metrics of `higher_is_better`, left, right, got left"),
        ({"left": 1.0, "right": 1.0, "more": 1.0}, "left, right, got left, right, more"),
    ],
)
def test_what_train_must_return(returned: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        compared(lambda seed, **options: returned)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "Expecting property name .*"),
        ("{}", "dict"),
        ("[1]", "list"),
        (json.dumps([{"job": {}, "values": [1.0]}]), r".*\(KeyError\('run'\)\)"),
    ],
)
def test_a_file_with_other_contents_is_rejected_and_not_changed(text: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    message = rf"^`path` must be a file .* written, or none yet, got .*other.json[:,] {found}\. Give another path\.$"
    with pytest.raises(ValueError, match=message):
        compared(path=path)
    assert path.read_text() == text


def test_a_binary_file_is_rejected_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\x03\x80")
    with pytest.raises(ValueError, match=r"`path` must be a file that .* got .*model.pt: .*decode.*Give another path"):
        compared(path=path)
    assert path.read_bytes() == b"PK\x03\x80"


def test_tensors_are_metrics_too() -> None:
    result = compared(lambda seed, **options: {"left": torch.tensor(2.0), "right": torch.tensor([1.0])})
    assert result.metrics["two"]["left"].tolist() == [2.0] * 3
