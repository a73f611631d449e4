"""The check of the built documentation finds resources of other hosts, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.publishing.remote import in_folder, in_page

REMOTE = "https://cdn.example.org/file"


@pytest.mark.parametrize(
    "page",
    [
        f'<script defer src="{REMOTE}.js"></script>',
        '<script src="//cdn.example.org/file.js"></script>',
        f'<link rel="stylesheet" href="{REMOTE}.css">',
        f'<link rel="preload" as="font" href="{REMOTE}.woff">',
        f'<img src="{REMOTE}.png">',
        f'<img src="_images/a.png" srcset="{REMOTE}.png 2x">',
        f'<p style="background: url({REMOTE}.png)">text</p>',
        f'<style>@font-face {{ src: url("{REMOTE}.woff") }}</style>',
        f'<style>@import "{REMOTE}.css";</style>',
        f'<svg><image href="{REMOTE}.png"/></svg>',
    ],
)
def test_remote_is_found(page: str) -> None:
    (address,) = in_page(f"<html><body><p>before</p>{page}</body></html>")
    assert "cdn.example.org/file" in address


@pytest.mark.parametrize(
    "page",
    [
        f'<a href="{REMOTE}.html">a link</a>',
        f'<link rel="canonical" href="{REMOTE}.html">',
        '<script src="_static/doctools.js"></script>',
        '<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0"/></svg>',
        f"<style>p {{ color: red }}</style><pre>url({REMOTE})</pre>",
        "<img src=\"data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>\">",
    ],
)
def test_local_is_not_found(page: str) -> None:
    assert in_page(page) == []


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "_static").mkdir()
    (tmp_path / "index.html").write_text("<p>text</p>")
    (tmp_path / "_static" / "theme.css").write_text(f"@font-face {{ src: url({REMOTE}.woff) }}")
    (tmp_path / "_static" / "library.js").write_text(f"// {REMOTE}.js")
    assert list(in_folder(tmp_path)) == [f"{tmp_path / '_static' / 'theme.css'}: {REMOTE}.woff"]
