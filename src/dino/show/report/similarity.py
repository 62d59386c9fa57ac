"""The page of `dino explore` inside a report: the similarity of patches, under the pointer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from dino.data.images.decode import as_picture
from dino.data.images.patch_grid import shorter_side
from dino.models.backbone import Backbone
from dino.show.explorer.page import document
from dino.show.explorer.patches import patch_features
from dino.show.explorer.payload import content
from dino.show.report.photographs import CELLS, SIDE, Photograph

LARGEST = 4_000_000
"""Bytes; the patches are made larger, by smaller images, until the page inside has fewer."""


class Frame(NamedTuple):
    """A section with a page inside, and the hashes of the scripts that it runs."""

    section: str = ""
    scripts: tuple[str, ...] = ()


def similarity(network: Backbone, photos: Sequence[Photograph]) -> Frame:
    """A frame with the similarity of each patch of the photographs to all others."""
    patch = network.patch_size or 1
    longest = min(SIDE, CELLS * patch) if network.patch_size else SIDE
    while True:
        found = []
        for photo in photos:
            width, height = as_picture(photo.sample).size
            size = max(patch, shorter_side(height, width, longest))
            found.append(patch_features(network, photo.name, photo.sample, size))
        inner, _ = document(content(found), repr(network).strip("<>"))
        attribute = escape(inner)
        if len(attribute) <= LARGEST or longest < 4 * patch:
            break
        longest = longest * 2 // 3
    intro = (
        "Point at a patch, and every patch of every picture takes the colour of its cosine "
        "similarity to it. Good: the similar patches lie on the same object, or on such objects in "
        "other pictures. Keys: Tab leads to the pictures, arrows move the patch."
    )
    frame = (
        f'<iframe class="explore" title="Similar patches" sandbox="allow-scripts allow-downloads" '
        f'loading="lazy" srcdoc="{attribute}"></iframe>'
    )
    hashes = re.findall(r"script-src '(sha256-[^']+)'", inner)
    return Frame(f"<h2>Similar patches</h2><p>{intro}</p>{frame}", tuple(hashes))
