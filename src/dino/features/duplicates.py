"""The near duplicates of a source: which images, and which copy to keep.

Shapes: n images, N numbers of a descriptor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dino.data.equal_files import equal_files
from dino.data.images.contact_sheet import Cell
from dino.data.sources.open import Source
from dino.features.contact_sheet import ImagesByPath, save_sheet
from dino.features.copy_descriptor import RIDGE, learned_whitening
from dino.features.near_duplicates import copy_to_keep, groups
from dino.features.table import FeatureTable
from dino.files import atomic_csv

SHEET = (24, 8)
"""Most groups, and images of each, on a contact sheet."""


@dataclass(frozen=True)
class Duplicates:
    """Groups of near duplicates.

    Attributes:
        content: as JSON takes it: "images", "skipped", "groups" of paths, and of each the one to
            "keep".
        sentence: how many there are.
        files: the list of all groups (CSV), and the contact sheet of the largest.
    """

    content: dict[str, Any]
    sentence: str
    files: list[Path]


def find_duplicates(
    images: FeatureTable,
    source: Source,
    threshold: float,
    listing: Path,
    sheet: Path,
    *,
    examples: Float[Tensor, "_ N"] | None = None,
    device: torch.device | None = None,
) -> Duplicates:
    """Find near duplicates, and write the list and the sheet. Files with equal bytes are some, too.

    Args:
        images: the descriptors (`copy_descriptor`) of the source.
        source: the images.
        threshold: cosine similarity after whitening.
        listing: where the groups are listed.
        sheet: where the largest are shown; nothing is written if there are none.
        examples: descriptors of other images from which whitening is learned.
        device: where to compare.

    Raises:
        UserError: if whitening cannot be learned from so few images.
    """
    features = images.finite()
    whitening = learned_whitening(features if examples is None else examples, "centred", RIDGE)
    known = [(first, i) for first, *others in equal_files(images.paths) for i in others]
    found = [
        [(images.paths[index], similarity) for index, similarity in group]
        for group in groups(whitening(features), threshold, known, device=device)
    ]
    searched = ImagesByPath(source)
    sizes = [{path: searched.size(path) for path, _ in group} for group in found]
    keep = [copy_to_keep(group) for group in sizes]
    content = {
        "images": len(images),
        "skipped": [error.path for error in images.skipped],
        "groups": [[path for path, _ in group] for group in found],
        "keep": keep,
    }
    count = sum(map(len, found))
    sentence = f"{len(found):,} groups of near duplicates, {count:,} of {len(images):,} images"
    sentence += "; the list says which copy to keep" if found else ""
    files = _save_groups(found, keep, searched, listing, sheet, threshold)
    return Duplicates(content, sentence, files)


def _save_groups(
    found: Sequence[Sequence[tuple[str, float]]],
    keep: Sequence[str],
    searched: ImagesByPath,
    listing: Path,
    sheet: Path,
    threshold: float,
) -> list[Path]:
    """Write all groups as CSV, and the largest as a contact sheet."""
    lines = (
        (number, path, f"{similarity:.6f}", "yes" if path == best else "no")
        for number, (group, best) in enumerate(zip(found, keep, strict=True), start=1)
        for path, similarity in group
    )
    atomic_csv(listing, ("group", "path", "similarity", "keep"), lines)
    if not found:
        return [listing]
    rows = [
        _row(searched, group, best) for group, best in zip(found[: SHEET[0]], keep, strict=False)
    ]
    shown = "all" if len(rows) == len(found) else f"the {len(rows)} largest of"
    title = (
        f"Near duplicates: {shown} {len(found):,} groups. Framed: the copy to keep, the largest of "
        "its group. Numbers: width x height, and the cosine similarity to the group's most "
        f"typical image (threshold {threshold:g})."
    )
    save_sheet(sheet, rows, title)
    return [listing, sheet]


def _row(searched: ImagesByPath, group: Sequence[tuple[str, float]], best: str) -> list[Cell]:
    """A row of the sheet: the copy to keep, then the others, most typical first."""
    others = [pair for pair in group if pair[0] != best]
    cells = []
    for path, similarity in [(best, dict(group)[best]), *others][: SHEET[1]]:
        height, width = searched.size(path)
        caption = f"{width} x {height}, {similarity:.3f}"
        cells.append(
            searched.cell(path, f"keep: {caption}", "right")
            if path == best
            else searched.cell(path, caption)
        )
    if left := len(group) - len(cells):
        cells[-1] = replace(cells[-1], caption=f"{cells[-1].caption}\nand {left:,} more")
    return cells
