"""Configuration of Sphinx. Builds and reads without a network: no links into other projects' pages, no CDN."""

import importlib.util
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset

import rotoopt

project = "rotoopt"
author = "The rotoopt authors"
copyright = "2026, The rotoopt authors"
version = release = rotoopt.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "myst_parser",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2  # `page.md#heading` is a link, as on a repository page

autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Torch's own docstrings are not ours to build, let alone to pass with warnings as errors.
autodoc_inherit_docstrings = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"rotoopt {release}"

mathjax_path = "mathjax/tex-chtml.js"


def copy_mathjax(app: Sphinx) -> None:
    """Copy MathJax (Apache 2.0) and its fonts into the built pages; of 24 MB, the 2 that formulas may load."""
    if app.builder.format != "html":
        return
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("The documentation needs sphinx-mathjax-offline: pip install '.[docs]'")
    source = Path(spec.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    copy_asset(source / "tex-chtml.js", target)
    for folder in ("input/tex/extensions", "output/chtml/fonts"):
        copy_asset(source / folder, target / folder)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", copy_mathjax)
