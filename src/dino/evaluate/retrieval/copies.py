"""Copy detection: which original a picture was made from (paper section 4.2.1, Table 4).

Measured on Copydays and whatever is laid out like it; or, for a user's folder, its groups of near
duplicates as a list and a contact sheet.

Shapes: q queries, n images, B batch, C channels, H W pixels, h w patches, D width, N = 2 D.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dino.data.sources.open import Source, open_source
from dino.evaluate.command import Measured, load_rgb, networks, table, write
from dino.evaluate.contact_sheet import Pictures, save_sheet
from dino.evaluate.features.cache import Descriptor, described
from dino.evaluate.features.export import Squeeze
from dino.evaluate.features.search import nearest
from dino.evaluate.features.table import FeatureTable
from dino.evaluate.retrieval.copydays import Copydays, open_copydays
from dino.evaluate.retrieval.near_duplicates import Group, equal_files, groups
from dino.evaluate.retrieval.ranking_metrics import average_precision
from dino.evaluate.retrieval.whitening import Covariance, Whitening
from dino.files import UserError, atomic_csv
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import pick_device, process_group

POWER = 4.0
"""The exponent of GeM in the published code."""

KEPT = 20
"""A copy whose original is not among so many neighbours counts as not found (published code)."""

RIDGE = 0.1
"""Of the whitening that is learned from a user's folder, see `Whitening.learn`."""

FEWEST = 16
"""Images from which whitening can be learned at all."""

SHOWN = (24, 8)
"""At most so many groups, and images of each, are on a contact sheet."""


# ----------------------------------------------------------------------------- the descriptor
def gem(maps: Float[Tensor, "B D h w"], power: float = POWER) -> Float[Tensor, "B D"]:
    """Generalised mean over the patches (Radenovic et al. 2018).

    As in the published code all that is below 1e-6, about half of a ViT, counts as 1e-6.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # bfloat16 has no such powers
    return maps.clamp(min=1e-6).pow(power).mean(dim=(2, 3)).pow(1 / power)


def cls_gem(backbone: Backbone, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
    """The CLS token and the GeM of the patch tokens after the final norm, one behind the other.

    Of convnets the pooled feature and the GeM of the last map.
    """
    last = backbone.features(images)
    return torch.cat([last.cls[-1], gem(last.patches[-1])], dim=1)


def descriptor(backbone: Backbone, size: int | None = None) -> Descriptor:
    """The descriptor of copies, of images squeezed to `size` x `size` pixels.

    Args:
        backbone: the network.
        size: by default as in Table 4: 320 for patches of 8 pixels, else 224.
    """
    own = backbone.preprocessing
    usual = 320 if backbone.patch_size == 8 else 224
    return Descriptor("cls-gem", Squeeze(size or usual, own.mean, own.std), cls_gem, {"p": POWER})


def average_precisions(
    queries: Float[Tensor, "q D"],
    database: Float[Tensor, "n D"],
    origins: Sequence[Collection[int]],
    device: torch.device | str | None = None,
) -> list[float]:
    """Average precision of each query, 0 to 1; positives beyond the first 20 are not found.

    Args:
        queries: features of copies.
        database: features of originals, and whatever is to be told from them.
        origins: of each query, indices into the database, at least one.
        device: where to compute; by default where `queries` are.
    """
    _, index = nearest(queries, database, min(KEPT, len(database)), device=device)
    return [
        average_precision([rank for rank, i in enumerate(found) if i in wanted], len(wanted))
        for found, wanted in zip(index.tolist(), origins, strict=True)
    ]


# -------------------------------------------------------------------------------- the command
@dataclass(frozen=True, kw_only=True)
class Copies(Measured):
    """Find copies of images: the benchmark Copydays (section 4.2.1), or duplicates among yours."""

    copydays: str | None = None
    """The benchmark: a folder with original/ and strong/, jpegqual/N/ or crops/N/."""
    data: str | None = None
    """Instead of the benchmark, images among which near duplicates are searched: a folder, a list
    or demo."""
    distractors: str | None = None
    """With --copydays: images that hide the originals; the paper takes 10,000 of YFCC100M."""
    whiten_with: str | None = None
    """Images that whitening is learned from; the paper takes 20,000 others of YFCC100M. Without
    them features of the benchmark stay as they are, and those of --data are whitened by
    themselves."""
    whitening: Covariance = "reference"
    """With --copydays: reference, as in the published code, or centred: a proper covariance."""
    threshold: float = 0.9
    """With --data: cosine similarity, after whitening, from which two images are near duplicates.
    Lower finds stronger alterations, and more pairs that are merely alike."""
    size: int | None = None
    """Images are squeezed to so many pixels a side; as in the paper by default 320 for patches of 8
    pixels, else 224."""
    batch: int = 64
    """Images at a time."""


def run(settings: Copies) -> dict[str, Any]:
    """`dino evaluate copies`: one table and JSON; or a list of groups and a contact sheet.

    Returns:
        For the benchmark what the JSON says under "copies": mAP in percent by network and block.
        For a folder what it says under "duplicates".

    Raises:
        UserError: for weights or images that are not there or do not fit.
    """
    if (settings.copydays is None) == (settings.data is None):
        raise UserError("give either --copydays with the benchmark, or --data with your own images")
    if settings.size is not None and settings.size < 1:
        raise UserError(f"--size must be a number of pixels, not {settings.size}")
    return _benchmark(settings) if settings.copydays is not None else _duplicates(settings)


def _table(network: Backbone, source: Source, settings: Copies, title: str) -> FeatureTable:
    what = descriptor(network, settings.size)
    return described(
        network, source, what, batch=settings.batch, title=title, **settings.extraction()
    )


# ------------------------------------------------------------------------------- the benchmark
def _benchmark(settings: Copies) -> dict[str, Any]:
    assert settings.copydays is not None
    copydays = open_copydays(settings.copydays)
    others = [
        None if data is None else open_source(data)
        for data in (settings.distractors, settings.whiten_with)
    ]
    device = pick_device(settings.device)
    with process_group(device) as here:
        backbone = load_rgb(settings.weights, device)
        found = {
            name: _scores(network, copydays, others[0], others[1], settings, device)
            for name, network in networks(backbone, settings).items()
        }
        if here.main:
            about = {
                "originals": len(copydays.originals),
                "distractors": 0 if others[0] is None else len(others[0]),
                "whitened": None if others[1] is None else settings.whitening,
            }
            _print(found, about, copydays)
            write("copies", {"copies": found, **about}, backbone, settings)
    return found


def _scores(
    network: Backbone,
    copydays: Copydays,
    distractors: Source | None,
    fit: Source | None,
    settings: Copies,
    device: torch.device,
) -> dict[str, float]:
    """Mean average precision in percent by block."""
    tables = partial(_table, network, settings=settings)
    database = tables(copydays.originals, title="originals").checked(needs_all="Copydays")
    if distractors is not None:
        hiding = tables(distractors, title="distractors").checked()
        database = torch.cat([database, hiding])
    white = None
    if fit is not None:
        white = _learned(tables(fit, title="whitening").checked(), settings.whitening)
        database = white(database)
    scores = {}
    for block in copydays.blocks:
        queries = tables(block.copies, title=block.name).checked(needs_all="Copydays")
        queries = queries if white is None else white(queries)
        precisions = average_precisions(queries, database, block.origins, device)
        scores[block.name] = 100 * sum(precisions) / len(precisions)
    return scores


def _learned(
    features: Float[Tensor, "n D"], covariance: Covariance, ridge: float | None = None
) -> Whitening:
    if len(features) < FEWEST:
        raise UserError(
            f"whitening cannot be learned from {len(features)} images: give --whiten-with a folder "
            f"of {FEWEST} or more, better thousands"
        )
    return Whitening.learn(features, covariance, ridge)


def _print(found: dict[str, dict[str, float]], about: dict[str, Any], copydays: Copydays) -> None:
    whitened = f"{about['whitened']} whitening" if about["whitened"] else "not whitened"
    title = (
        f"copy detection, mAP in %\n{about['originals']} originals, "
        f"{about['distractors']} distractors, {whitened}"
    )
    rows = {
        block.name: [f"{scores[block.name]:.1f}" for scores in found.values()]
        + [f"{len(block.copies)}"]
        for block in copydays.blocks
    }
    Console().print(table(title, ["block", *found, "copies"], rows))


# --------------------------------------------------------------------------- a folder of images
def _duplicates(settings: Copies) -> dict[str, Any]:
    if settings.baseline or settings.distractors is not None:
        option = "--baseline" if settings.baseline else "--distractors"
        raise UserError(f"{option} needs the benchmark: give --copydays")
    if not -1 <= settings.threshold <= 1:
        raise UserError(f"--threshold is a cosine, from -1 to 1, not {settings.threshold:g}")
    source = open_source(settings.data)
    fit = None if settings.whiten_with is None else open_source(settings.whiten_with)
    device = pick_device(settings.device)
    with process_group(device) as here:
        backbone = load_rgb(settings.weights, device)
        images = _table(backbone, source, settings, "images")
        features = images.checked()
        if fit is not None:
            features = _table(backbone, fit, settings, "whitening").checked()
        white = _learned(features, "centred", RIDGE)
        content: dict[str, Any] = {}
        if here.main:
            known = equal_files(images.paths)
            found = groups(
                white(images.features), settings.threshold, known, device=device, progress=True
            )
            content = {
                "images": len(images),
                "skipped": [error.path for error in images.skipped],
                "groups": [[images.paths[i] for i in group.members] for group in found],
            }
            path = write("duplicates", {"duplicates": content}, backbone, settings)
            count = sum(len(group.members) for group in found)
            words = f"{len(found):,} groups of near duplicates, {count:,} of {len(images):,} images"
            Console().print(words, highlight=False)
            listing = path.with_suffix(".csv")
            atomic_csv(listing, ("group", "path", "similarity"), _rows(found, images.paths))
            Console().print(f"{listing}", highlight=False, soft_wrap=True)
            if found:
                sheet = path.with_suffix(".png")
                _draw(sheet, found, images.paths, source)
                Console().print(f"{sheet}", highlight=False, soft_wrap=True)
    return content


def _rows(found: Sequence[Group], paths: Sequence[str]) -> list[tuple[int, str, str]]:
    return [
        (number, paths[member], f"{similarity:.6f}")
        for number, group in enumerate(found, start=1)
        for member, similarity in zip(group.members, group.similarity, strict=True)
    ]


def _draw(path: Path, found: Sequence[Group], paths: Sequence[str], source: Source) -> None:
    """A row for each of the largest groups: the image most like all, then its nearest."""
    pictures = Pictures(source)
    save_sheet(
        path,
        [
            [
                pictures.cell(paths[member], f"{similarity:.3f}", marked=place == 0)
                for place, (member, similarity) in enumerate(
                    zip(group.members[: SHOWN[1]], group.similarity, strict=False)
                )
            ]
            for group in found[: SHOWN[0]]
        ],
    )
