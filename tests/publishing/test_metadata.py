"""README.md on a package index: its links are absolute there, with a base address that is defined once."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType

import pytest

import rotoopt

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WRITTEN = ("rotoopt", "tests", "docs", "examples", ".ci", ".github")


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    path = ROOT / ".ci" / "metadata.py"
    spec = importlib.util.spec_from_file_location("package_metadata", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(hook: ModuleType, readme: str) -> str:
    text: str = hook.with_absolute_links(readme, repository="https://r", documentation="https://d", version="1.2")
    return text


@pytest.mark.parametrize(
    ("link", "address"),
    [
        ("[page](docs/how_to/index.md)", "[page](https://d/how_to/index.html)"),
        ("[part](docs/compatibility.md#shapes-of-models)", "[part](https://d/compatibility.html#shapes-of-models)"),
        ("![a picture](docs/images/toy.png)", "![a picture](https://r/raw/v1.2/docs/images/toy.png)"),
        ('<img src="docs/images/toy.svg">', '<img src="https://r/raw/v1.2/docs/images/toy.svg">'),
        ("[license](LICENSE)", "[license](https://r/blob/v1.2/LICENSE)"),
        ("[paper](https://arxiv.org/abs/2103.02631)", None),
        ("[below](#limits)", None),
        ('```python\nheads["price"](z)\n```', None),
        ('`heads["price"](z)`', None),
    ],
)
def test_link(hook: ModuleType, link: str, address: str | None) -> None:
    assert published(hook, f"{link}\n\n{link}\n") == f"{address or link}\n\n{address or link}\n"


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


def test_relative_links_of_the_readme_exist_and_are_absolute_on_an_index(hook: ModuleType) -> None:
    relative = r"(?:\]\(|src=\"|srcset=\"|href=\")((?!https?:|#)[^)\s\"#]+)"
    links = re.findall(relative, without_code(README))
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []
    assert re.findall(relative, without_code(published(hook, README))) == []


def files() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.is_file())
    for folder in WRITTEN:
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file() and "_build" not in path.parts)


@pytest.mark.parametrize("setting", ["repository", "documentation"])
def test_address_is_defined_once(setting: str) -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (address,) = re.findall(rf'^{setting} = "https://(.+)"$', settings, re.MULTILINE)
    host_and_name = address.partition("/en/")[0].encode()
    assert [path.name for path in files() for _ in range(path.read_bytes().count(host_and_name))] == ["pyproject.toml"]


def test_version_is_that_of_the_package() -> None:
    assert metadata("rotoopt")["Version"] == rotoopt.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", rotoopt.__version__)
