"""Finds resources that built pages load from other hosts, which are missing without a network.

    python -m tests.publishing.remote docs/_build/html

prints them, and fails if there are any. Ordinary links are not included.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADED = ("src", "srcset", "poster", "data")
LINKS_THAT_LOAD = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "manifest", "preconnect"}
REMOTE = re.compile(r"(?:https?:)?//")
IN_STYLE = re.compile(r"(?:url\(\s*|@import\s+)['\"]?(?P<address>(?:https?:)?//[^'\")\s;]+)")


class _Page(HTMLParser):
    """Collects the remote addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        loaded = [value for name, value in values.items() if name in LOADED]
        if tag == "link" and LINKS_THAT_LOAD & set(values.get("rel", "").split()):
            loaded.append(values.get("href", ""))
        if tag == "image":  # of SVG
            loaded += [values.get("href", ""), values.get("xlink:href", "")]
        # A srcset has several addresses.
        self.found += [address for value in loaded for address in re.split(r"[,\s]+", value) if REMOTE.match(address)]
        self.found += in_style(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.found += in_style(data)


def in_style(text: str) -> list[str]:
    return [found["address"] for found in IN_STYLE.finditer(text)]


def in_page(text: str) -> list[str]:
    page = _Page()
    page.feed(text)
    return page.found


def in_folder(folder: Path) -> Iterator[str]:
    """Yield ``file: address`` for everything remote that pages, style sheets and drawings load."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".html", ".svg", ".css"}:
            text = path.read_text(encoding="utf-8")
            for address in in_style(text) if path.suffix == ".css" else in_page(text):
                yield f"{path}: {address}"


if __name__ == "__main__":
    if found := list(in_folder(Path(sys.argv[1]))):
        sys.exit("Pages must load nothing from other hosts, got\n" + "\n".join(found))
