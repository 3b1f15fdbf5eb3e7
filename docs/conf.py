"""Sphinx configuration of hocket's documentation."""

import re
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

project = "hocket"
author = "the hocket authors"
copyright = "the hocket authors"
release = version = installed_version("hocket")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "examples", "benchmarks"]
html_theme = "furo"
html_title = "hocket"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


def setup(app: Sphinx) -> None:
    """Let the page of benchmarks hold the tables that ``make bench`` has written."""
    app.connect("source-read", append_tables)


def append_tables(_: Sphinx, page: str, source: list[str]) -> None:
    """Their headings become those of sections; a page without tables says so."""
    if page == "benchmarks":
        tables = [file.read_text() for file in sorted(Path(__file__).with_name("benchmarks").glob("*.md"))]
        demoted = [re.sub(r"^(?=#+ )", "#", table, flags=re.MULTILINE) for table in tables]
        source[0] += "\n\n".join(demoted) or "No benchmark has been run in this checkout.\n"
