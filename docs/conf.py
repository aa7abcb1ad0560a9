"""How Sphinx builds the documents: `make docs`."""

from importlib.metadata import version as installed

project = "zerolith"
author = "The zerolith authors"
copyright = "2026, The zerolith authors"  # Sphinx's name for it
version = release = installed("zerolith")
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"zerolith {release}"
myst_heading_anchors = 3
exclude_patterns = ["_build"]
