"""The documentation as a site that needs no network: `make docs`.

Pages are those of this folder; the reference of all settings and commands is made from the
dataclasses at each build (`reference.py`). Warnings, such as broken links, are errors.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
import reference

import dino

project, author, release = "dino", "the authors of dino", dino.__version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title = "furo", "dino"
html_show_sourcelink, html_copy_source = False, False
exclude_patterns = ["generated/readme.md"]
myst_heading_anchors = 3
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_display_short_literal_types = True

HERE = Path(__file__).parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")
"""A link out of this folder, which the site has no page for."""


def outside(app: Sphinx, document: str, source: list[str]) -> None:
    """Name files outside of this folder by their paths in the repository."""
    source[0] = OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2].removeprefix('../')}`)", source[0])


def from_root(name: str) -> str:
    """A page of the repository's root, with links as seen from this folder."""
    text = (HERE.parent / name).read_text(encoding="utf-8")
    text = re.sub(r"\]\((?![a-z]+:|#|docs/)", "](../", text)
    text = re.sub(r"\]\(docs\)", "](start.md)", text).replace("](docs/", "](")
    return OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2].removeprefix('../')}`)", text)


def setup(app: Sphinx) -> None:
    """Write the generated pages, and rewrite links that lead out of this folder."""
    generated = HERE / "generated"
    reference.write(generated)
    (generated / "readme.md").write_text(from_root("README.md"), encoding="utf-8")
    contributing = (
        from_root("CONTRIBUTING.md").replace("](", "](../").replace("](../http", "](http")
    )
    (generated / "contributing.md").write_text(contributing, encoding="utf-8")
    app.connect("source-read", outside)
