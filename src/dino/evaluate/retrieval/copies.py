"""Copy detection: from which original an image was made (paper section 4.2.1, Table 4).

Measured on Copydays and folders laid out like it; or, for a user's folder, its groups of near
duplicates as a list and a contact sheet.

Shapes: q queries, n images, B batch, C channels, H W pixels, h w patches, D width, N = 2 D.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dino.data.images.contact_sheet import Cell
from dino.data.sources.open import Source, open_source
from dino.evaluate import command
from dino.evaluate.retrieval.copydays import Block, open_copydays
from dino.evaluate.retrieval.ranking_metrics import average_precision
from dino.evaluate.shared_images import equal_files
from dino.features.command import OptionalImages, number_table
from dino.features.contact_sheet import ImagesByPath, save_sheet
from dino.features.extractor import Descriptor, extract
from dino.features.near_duplicates import copy_to_keep, groups
from dino.features.raw_pixels import SquareResize
from dino.features.search import nearest
from dino.features.table import FeatureTable
from dino.features.whitening import Covariance, Whitening
from dino.files import UserError, atomic_csv, check_outside
from dino.models.backbone import Backbone
from dino.runtime import ranks
from dino.settings import Range, validated

POWER = 4.0
"""The exponent of GeM in the published code."""

DEPTH = 20
"""A copy whose original is not among this many neighbours is not found (published code)."""

RIDGE = 0.1
"""Of the whitening that is learned from a user's folder, see `Whitening.learn`."""

FEWEST = 16
"""Whitening is learned from at least this many images."""

SHEET = (24, 8)
"""Most groups, and images of each, on a contact sheet."""


# ----------------------------------------------------------------------------- the descriptor
def gem(maps: Float[Tensor, "B D h w"], power: float = POWER) -> Float[Tensor, "B D"]:
    """Generalised mean over the patches (Radenovic et al. 2018).

    As in the published code values below 1e-6, about half of a ViT's, are raised to 1e-6.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # bfloat16 has no such powers
    return maps.clamp(min=1e-6).pow(power).mean(dim=(2, 3)).pow(1 / power)


def cls_gem(backbone: Backbone, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
    """The CLS token and the GeM of the patch tokens after the final norm, concatenated.

    Of convnets the pooled feature and the GeM of the last map.
    """
    last = backbone.features(images)
    return torch.cat([last.cls[-1], gem(last.patches[-1])], dim=1)


def descriptor(backbone: Backbone, size: int | None = None) -> Descriptor:
    """The descriptor of copies, of images resized to `size` x `size` pixels.

    The default is that of Table 4: 320 for patches of 8 pixels, else 224.
    """
    transform = backbone.preprocessing
    default = 320 if backbone.patch_size == 8 else 224
    resize = SquareResize(size or default, transform.mean, transform.std)
    return Descriptor("cls-gem", resize, cls_gem, {"p": POWER})


def average_precisions(
    queries: Float[Tensor, "q D"],
    database: Float[Tensor, "n D"],
    origins: Sequence[Collection[int]],
    device: torch.device | str | None = None,
) -> list[float]:
    """Average precision of each query, 0 to 1; positives beyond the first 20 are not found.

    Args:
        queries: features of copies.
        database: features of originals and distractors.
        origins: of each query, indices into the database, at least one.
        device: where to compute; by default where `queries` are.
    """
    _, index = nearest(queries, database, min(DEPTH, len(database)), device=device)
    return [
        average_precision([rank for rank, i in enumerate(found) if i in positives], len(positives))
        for found, positives in zip(index.tolist(), origins, strict=True)
    ]


# -------------------------------------------------------------------------------- the command
@dataclass(frozen=True, kw_only=True)
class Copies(command.FeatureEvaluationSettings):
    """Find copies of images: the benchmark Copydays (section 4.2.1), or duplicates among yours."""

    renamed: ClassVar[dict[str, str]] = {"copydays": "benchmark"}

    benchmark: OptionalImages = None
    """Copydays: a folder with original/ and strong/, jpegqual/N/ or crops/N/."""
    data: OptionalImages = None
    """Instead of the benchmark, images among which near duplicates are searched: a folder, a list
    or demo."""
    distractors: OptionalImages = None
    """With --benchmark: more images in the database; the paper takes 10,000 of YFCC100M."""
    whiten_with: OptionalImages = None
    """Images from which whitening is learned; the paper takes 20,000 others of YFCC100M. Without
    them features of the benchmark are not whitened, and those of --data learn from themselves."""
    whitening: Covariance = "reference"
    """With --benchmark: reference, as in the published code, or centred: a proper covariance."""
    threshold: Annotated[float, Range(low=-1, high=1)] = 0.9
    """With --data: cosine similarity, after whitening, from which two images are near duplicates.
    Lower finds stronger alterations, and more pairs that are only similar."""
    size: Annotated[int, Range(low=1)] | None = None
    """Images are resized to size x size pixels; as in the paper by default 320 for patches of 8
    pixels, else 224."""
    batch: Annotated[int, Range(low=1)] = 64
    """Images at a time."""

    def extract(self, network: Backbone, source: Source, title: str) -> FeatureTable:
        """The descriptors of a source."""
        options = {"batch": self.batch, "title": title, **self.extraction()}
        return extract(network, source, descriptor(network, self.size), **options)


def run(settings: Copies) -> dict[str, Any]:
    """`dino evaluate copies`: one table and JSON; or a list of groups and a contact sheet.

    Returns:
        For the benchmark the JSON's "copies": mAP in percent by network and block. For a folder the
        JSON's "duplicates".

    Raises:
        UserError: for weights or images that are missing or inconsistent.
    """
    settings = validated(settings)
    check_outside(settings.out, settings.data)  # pictures are written beside it
    if settings.benchmark is not None and settings.data is None:
        return _benchmark(settings, settings.benchmark)
    if settings.data is not None and settings.benchmark is None:
        return _duplicates(settings, settings.data)
    raise UserError("give either --benchmark (Copydays), or --data with your images")


# ------------------------------------------------------------------------------- the benchmark
def _benchmark(settings: Copies, root: str) -> dict[str, Any]:
    names = (root, settings.distractors)
    with command.evaluation_run("copies", settings, *names, rgb=True) as started:
        blocks = open_copydays(root)
        distractors = None if settings.distractors is None else open_source(settings.distractors)
        training = None if settings.whiten_with is None else open_source(settings.whiten_with)
        found = {
            name: _scores(network, blocks, distractors, training, settings)
            for name, network in started.networks.items()
        }
        about = {
            "originals": len(blocks[-1].copies),
            "distractors": 0 if distractors is None else len(distractors),
            "whitened": None if training is None else settings.whitening,
        }
        whitened = f"{about['whitened']} whitening" if about["whitened"] else "not whitened"
        title = (
            f"copy detection, mAP in %\n{about['originals']} originals, "
            f"{about['distractors']} distractors, {whitened}"
        )
        rows = {}
        for block in blocks:
            cells = [f"{scores[block.name]:.1f}" for scores in found.values()]
            rows[block.name] = [*cells, f"{len(block.copies)}"]
        principal = {
            f"mAP, {block.name}": {name: {"percent": of[block.name]} for name, of in found.items()}
            for block in blocks
        }
        started.report(
            {"copies": found, **about},
            number_table(title, ["block", *found, "copies"], rows),
            images=sum(len(block.copies) for block in blocks),
            scores=principal,
        )
    return found


def _scores(
    network: Backbone,
    blocks: Sequence[Block],
    distractors: Source | None,
    training: Source | None,
    settings: Copies,
) -> dict[str, float]:
    """Mean average precision in percent by block."""
    device = next(network.parameters()).device
    database = settings.extract(network, blocks[-1].copies, "originals").finite("Copydays")
    if distractors is not None:
        others = settings.extract(network, distractors, "distractors").finite()
        database = torch.cat([database, others])
    whitening = None
    if training is not None:
        examples = settings.extract(network, training, "whitening").finite()
        whitening = _learned(examples, settings.whitening)
        database = whitening(database)
    scores = {}
    for block in blocks:
        queries = settings.extract(network, block.copies, block.name).finite("Copydays")
        queries = queries if whitening is None else whitening(queries)
        precisions = average_precisions(queries, database, block.origins, device)
        scores[block.name] = 100 * sum(precisions) / len(precisions)
    return scores


def _learned(features: Tensor, covariance: Covariance, ridge: float | None = None) -> Whitening:
    if len(features) < FEWEST:
        raise UserError(
            f"whitening cannot be learned from {len(features)} images: give --whiten-with a folder "
            f"of {FEWEST} or more, better thousands"
        )
    return Whitening.learn(features, covariance, ridge)


# --------------------------------------------------------------------------- a folder of images
def _duplicates(settings: Copies, data: str) -> dict[str, Any]:
    for option in ("baseline", "compare", "distractors"):
        if getattr(settings, option):
            raise UserError(f"--{option} needs --benchmark")
    with command.evaluation_run("duplicates", settings, data, rgb=True) as started:
        source = open_source(data)
        training = None if settings.whiten_with is None else open_source(settings.whiten_with)
        backbone = started.networks[command.TRAINED]
        images = settings.extract(backbone, source, "images")
        features = examples = images.finite()
        if training is not None:
            examples = settings.extract(backbone, training, "whitening").finite()
        features = _learned(examples, "centred", RIDGE)(features)
        if not ranks().main:
            return {}
        known = [(first, i) for first, *others in equal_files(images.paths) for i in others]
        device = next(backbone.parameters()).device
        found = [
            [(images.paths[index], similarity) for index, similarity in group]
            for group in groups(features, settings.threshold, known, device=device)
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
        files = _save_groups(found, keep, searched, started.path, settings.threshold)
        started.report({"duplicates": content}, sentence, images=len(images), files=files)
    return content


def _save_groups(
    found: Sequence[Sequence[tuple[str, float]]],
    keep: Sequence[str],
    searched: ImagesByPath,
    path: Path,
    threshold: float,
) -> list[Path]:
    """Write all groups as CSV, and the largest as a contact sheet, beside the result at `path`."""
    listing, sheet = path.with_suffix(".csv"), path.with_suffix(".png")
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
