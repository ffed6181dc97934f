"""Sphinx configuration: Markdown pages by myst-parser, the furo theme. Built with warnings as errors by `make docs`."""

import tomllib
from pathlib import Path

_project = tomllib.loads(Path(__file__).resolve().parent.parent.joinpath("pyproject.toml").read_text())["project"]

project = _project["name"]
release = version = _project["version"]
author = f"the {project} authors"
copyright = author

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"{project} {release}"
