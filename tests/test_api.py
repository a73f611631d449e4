"""The public names exist, are documented, and are typed."""

import re
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest

import rotoopt
import rotoopt.comparison
import rotoopt.rotograd
import rotoopt.weighting

API_PAGES = Path(__file__).parents[1] / "docs" / "api"


PACKAGES = (rotoopt, rotoopt.weighting, rotoopt.rotograd)


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in PACKAGES for name in package.__all__],
    ids=lambda each: str(each),
)
def test_public_name_is_documented(package: ModuleType, name: str) -> None:
    assert getattr(package, name).__doc__  # a class does not inherit its parent's
    pages = "".join(page.read_text(encoding="utf-8") for page in API_PAGES.glob("*.rst"))
    assert name in re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", pages, re.MULTILINE)


def test_root_exports_the_names_for_users_of_the_optimizer() -> None:
    assert len(rotoopt.__all__) <= 8
    assert set(rotoopt.__all__).isdisjoint(rotoopt.rotograd.__all__)


def test_package_is_typed() -> None:
    assert files("rotoopt").joinpath("py.typed").is_file()
