"""Sphinx configuration: Markdown pages by myst-parser, the furo theme. Built with warnings as errors by `make docs`."""

import tomllib
from pathlib import Path

_project = tomllib.loads(Path(__file__).resolve().parent.parent.joinpath("pyproject.toml").read_text())["project"]

project = _project["name"]
release = version = _project["version"]
author = f"the {project} authors"
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True
# In signatures: types of other projects, whose inventories an offline build cannot fetch; aliases of annotations; types
# of modules that are not public.
nitpick_ignore_regex = [
    ("py:class", r"(collections\.abc|concurrent\.futures|dist|os|torch)\..+|(datetime\.)?timedelta"),
    ("py:class", r"Fence|PathLike|ProgressWanted|StateDict"),
    ("py:class", r"snapstone\.(difference|manifest|plan|reader)\..+"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"{project} {release}"
