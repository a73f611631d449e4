"""What the package root promises: its names exist, are documented, and are typed."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

import rotoopt

API_PAGE = Path(__file__).parents[1] / "docs" / "api.rst"


@pytest.mark.parametrize("name", rotoopt.__all__)
def test_public_name_is_documented(name: str) -> None:
    assert getattr(rotoopt, name).__doc__  # a class does not inherit its parent's
    listed = re.findall(r"^\.\. auto\w+:: (\w+)$", API_PAGE.read_text(), re.MULTILINE)
    assert name in listed


def test_package_is_typed() -> None:
    assert files("rotoopt").joinpath("py.typed").is_file()
