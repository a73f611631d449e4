"""The documentation is executed: README.md and every Markdown page under docs.

The blocks of one page run in order in one namespace. A block that shall not run has another
language than ``python``, such as ``console``, ``diff`` or ``text``.
"""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[^\s`]*)[^`]*$")


def python_blocks(text: str) -> Iterator[tuple[int, str]]:
    """Yield every ``python`` block with the number of lines before it."""
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        if (opening := FENCE.match(line)) is None:
            continue
        indent, fence = opening["indent"], opening["fence"]
        block: list[str] = []
        for _, inner in lines:
            if re.fullmatch(rf" *{fence}{fence[0]}* *", inner):
                break
            block.append(inner.removeprefix(indent))
        else:
            raise ValueError(f"the code block opened in line {number} is never closed")
        if opening["language"] == "python":
            yield number, "\n".join(block) + "\n"


def run_page(page: Path) -> None:
    # The name of the running script, so that what a page defines can be found through its module.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, code in python_blocks(page.read_text(encoding="utf-8")):
        if re.search(r"^\s*>>> ", code, re.MULTILINE):
            parser = doctest.DocTestParser()
            test = parser.get_doctest(code, namespace, page.name, str(page), number)
            report: list[str] = []
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            runner.run(test, out=report.append, clear_globs=False)
            assert not runner.failures, "".join(report)
            namespace = test.globs
        else:
            # Leading newlines make tracebacks point to the line in the page.
            exec(compile("\n" * number + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a page writes lands there
    run_page(page)


RUNS = """
```python
number = 1
```
1. In a list, and in the namespace of the block before:

   ```python
   >>> number + 1
   2
   ```
```console
not python
```
"""


def test_runner_accepts_code_and_doctests(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(RUNS)
    run_page(page)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("```python\nassert False, 42\n```\n", AssertionError, "42"),
        ("```python\n>>> 1 + 1\n3\n```\n", AssertionError, r"Got:\n +2"),
        ("```python\nnumber = 1\n", ValueError, "line 1 is never closed"),
    ],
    ids=["code", "doctest", "open"],
)
def test_runner_rejects(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(error, match=message):
        run_page(page)
