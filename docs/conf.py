"""Configuration of Sphinx. Builds without a network: no links into other projects' pages."""

from importlib.metadata import version as installed_version

project = "rotoopt"
author = "The rotoopt authors"
copyright = "2026, The rotoopt authors"
version = release = installed_version("rotoopt")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "myst_parser",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Torch's own docstrings are not ours to build, let alone to pass with warnings as errors.
autodoc_inherit_docstrings = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"rotoopt {release}"
