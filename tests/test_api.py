"""What the package root promises: its names exist, are documented, and are typed."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

import rotoopt

API_PAGES = Path(__file__).parents[1] / "docs" / "api"


@pytest.mark.parametrize("name", rotoopt.__all__)
def test_public_name_is_documented(name: str) -> None:
    assert getattr(rotoopt, name).__doc__  # a class does not inherit its parent's
    pages = "".join(page.read_text(encoding="utf-8") for page in API_PAGES.glob("*.rst"))
    assert name in re.findall(r"^\.\. auto\w+:: (\w+)$", pages, re.MULTILINE)


def test_package_is_typed() -> None:
    assert files("rotoopt").joinpath("py.typed").is_file()
