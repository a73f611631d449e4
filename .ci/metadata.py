"""Metadata that is made at build time: project URLs, and README.md with links that work on a package index.

Relative links are right in a checkout and on a repository page. A package index has only the text: there a page of the
documentation is that of the hosted one, and every other file is that of this version in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

CODE = r"(?P<code>^ *```.*?^ *```|`[^`\n]+`)"
TARGET = r"(?P<before>\]\(|\b(?:src|srcset|href)=\")(?P<path>(?!https?:|mailto:|#)[^)\s\"]+)"
CODE_OR_TARGET = re.compile(f"{CODE}|{TARGET}", re.MULTILINE | re.DOTALL)
PAGE = re.compile(r"docs/(?P<name>[\w/]+)\.md(?P<section>#[\w-]+)?")
PICTURE = re.compile(r".*\.(png|svg)")


def with_absolute_links(readme: str, *, repository: str, documentation: str, version: str) -> str:
    """Return Markdown whose relative links and images have the addresses of the published ones."""

    def address(path: str) -> str:
        if page := PAGE.fullmatch(path):
            return f"{documentation}/{page['name']}.html{page['section'] or ''}"
        return f"{repository}/{'raw' if PICTURE.fullmatch(path) else 'blob'}/v{version}/{path}"

    return CODE_OR_TARGET.sub(lambda found: found["code"] or found["before"] + address(found["path"]), readme)


class Metadata(MetadataHookInterface):
    """Fills in ``urls`` and ``readme``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set both from the two addresses in pyproject.toml."""
        repository, documentation = self.config["repository"], self.config["documentation"]
        metadata["urls"] = {
            "Documentation": documentation,
            "Repository": repository,
            "Issues": f"{repository}/issues",
            "Changelog": f"{documentation}/changelog.html",
        }
        text = with_absolute_links(
            Path(self.root, "README.md").read_text(encoding="utf-8"),
            repository=repository,
            documentation=documentation,
            version=metadata["version"],
        )
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
