"""The declared versions are those of `make test-bounds` and of continuous integration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import bounds

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_oldest_python_is_the_declared_one() -> None:
    assert f'requires-python = ">={bounds.declared_pythons()[0]}"' in bounds.SETTINGS


def test_lower_bounds_are_those_of_the_dependencies() -> None:
    (dependencies,) = re.findall(r"^dependencies = \[\n(.*?)^\]", bounds.SETTINGS, re.MULTILINE | re.DOTALL)
    declared = re.findall(r'^ +"(.+?)"', dependencies, re.MULTILINE)
    assert [requirement.replace(">=", "==") for requirement in declared] == bounds.lower_bounds()


@pytest.mark.parametrize(
    ("pythons", "expected"),
    [
        (["3.10", "3.11", "3.12"], [("3.10", "oldest"), ("3.11", "newest"), ("3.12", "newest")]),
        (["3.12"], [("3.12", "oldest"), ("3.12", "newest")]),
    ],
    ids=["several", "one"],
)
def test_oldest_and_newest_torch_are_tested(pythons: list[str], expected: list[tuple[str, str]]) -> None:
    assert bounds.pairs(pythons) == expected


def test_core_exists() -> None:
    for path in (*bounds.CORE, *bounds.NOT_CORE):
        file, _, test = path.partition("::")
        assert (ROOT / file).exists(), path
        assert not test or f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), path


def test_missing_python_is_skipped() -> None:
    assert bounds.run("3.99", "newest") == ("Python 3.99: not here, skipped", True)


def test_continuous_integration_tests_the_same() -> None:
    matrix = read(ROOT / ".github" / "workflows" / "checks.yml")["jobs"]["bounds"]["strategy"]["matrix"]
    tried = [(python, torch) for python in matrix["python"] for torch in matrix["torch"]]
    tried += [(each["python"], each["torch"]) for each in matrix["include"]]
    assert set(tried) == set(bounds.pairs(bounds.declared_pythons()))


@pytest.mark.parametrize("form", [form for form in FORMS if form.name != "config.yml"], ids=lambda form: form.stem)
def test_issue_form_has_the_keys_that_github_requires(form: Path) -> None:
    content = read(form)
    assert {"name", "description", "body"} <= set(content)
    ids = [field["id"] for field in content["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in content["body"])
