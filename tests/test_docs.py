"""The documentation is executed: README.md and every Markdown page under docs.

The blocks of one page run in order in one namespace. A block that should not run has another
language than ``python``, such as ``console``, ``diff`` or ``text``. A ``text`` block right behind a
``python`` block is its output, up to the numbers.
"""

import contextlib
import doctest
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = {"tutorial.md", "compare.md"}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[^\s`]*)[^`]*$")
NUMBER = re.compile(r"[-+]?\b\d[\d.]*(e[-+]?\d+)?\b")


class Block(NamedTuple):
    """A block of code: its language, its first and last line, and its text."""

    language: str
    first: int
    last: int
    text: str


def blocks_of(text: str) -> Iterator[Block]:
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
        yield Block(opening["language"], number + 1, number + len(block), "\n".join(block) + "\n")


def outputs_of(text: str) -> Iterator[tuple[Block, Block | None]]:
    """Yield every ``python`` block, and the ``text`` block right behind it, if there is one."""
    lines, blocks = text.splitlines(), list(blocks_of(text))
    for block, after in itertools.zip_longest(blocks, blocks[1:]):
        if block.language != "python":
            continue
        behind = after is not None and not "".join(lines[block.last + 1 : after.first - 2]).strip()
        yield block, after if behind and after.language == "text" else None


def run_page(page: Path) -> list[tuple[Block, str]]:
    """Run a page, and return its ``text`` blocks with what was printed."""
    # The name of the running script, so that definitions of a page can be found through its module.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for block, expected in outputs_of(page.read_text(encoding="utf-8")):
        if re.search(r"^\s*>>> ", block.text, re.MULTILINE):
            parser = doctest.DocTestParser()
            test = parser.get_doctest(block.text, namespace, page.name, str(page), block.first - 1)
            report: list[str] = []
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            runner.run(test, out=report.append, clear_globs=False)
            assert not runner.failures, "".join(report)
            namespace = test.globs
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            # Leading newlines make tracebacks point to the line in the page.
            exec(compile("\n" * (block.first - 1) + block.text, str(page), "exec"), namespace)
        if expected is not None:
            printed.append((expected, output.getvalue()))
    return printed


def without_numbers(text: str) -> list[str]:
    text = re.sub(r"-{3,}", "---", text)  # the width of a table depends on its numbers
    return NUMBER.sub("#", text).split()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW)) for page in PAGES],
    ids=[str(page.relative_to(ROOT)) for page in PAGES],
)
def test_page_runs_and_prints_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the page writes its files there
    for expected, output in run_page(page):
        assert without_numbers(output) == without_numbers(expected.text), f"after line {expected.first}"


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
```python
print(f"{number / 3} of it")
```

```text
0.33 of it
```
"""


def test_runner_accepts_code_and_doctests(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(RUNS)
    [(block, output)] = run_page(page)
    assert block.text == "0.33 of it\n"
    assert without_numbers(output) == without_numbers(block.text) != without_numbers("0.33 of them")


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
