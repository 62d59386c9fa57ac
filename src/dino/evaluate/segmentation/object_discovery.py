"""Objects without labels from the similarity of patches, and their agreement with masks.

Two methods of the literature on our features, each of which finds one object an image: "ncut", the
normalised cut of TokenCut, and "lost", the seed expansion of LOST.

Shapes: D width, h w patches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from dino.data.images.contact_sheet import Cell, Frame
from dino.data.images.decode import as_picture
from dino.data.images.highlight import highlighted
from dino.data.images.image_errors import ImageError
from dino.data.images.masks import Ids, objects_in
from dino.data.images.png import save_picture
from dino.data.sampler import spread
from dino.data.sources.base import warn
from dino.data.sources.named_inputs import NamedInput, named_inputs
from dino.evaluate import command
from dino.evaluate.segmentation.coco import annotation, dataset
from dino.evaluate.segmentation.datasets import Objects, has_masks, scored_scenes
from dino.evaluate.segmentation.discovered import Discovered, stretched
from dino.evaluate.segmentation.discovery_metrics import MEASURES, Agreement, agreement, summary
from dino.evaluate.segmentation.normalized_cut import normalized_cut
from dino.evaluate.segmentation.seed_expansion import seed_expansion
from dino.features.command import Count, Images, number_table, print_path, provenance
from dino.features.contact_sheet import save_sheet
from dino.features.patch_classifiers import PatchExtractor
from dino.features.table import my_share, warn_skipped
from dino.files import UserError, atomic_write, check_output, check_outside
from dino.models.attention import mass_mask
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import autocast, gather_objects, memory_errors, pick_device, process_group, ranks
from dino.settings import Range, validated

Method = Literal["ncut", "lost"]
METHODS: dict[Method, str] = {"ncut": "normalised cut", "lost": "seed expansion"}

SHEET, PER_ROW, TILE = 24, 6, 200
"""Most images of a contact sheet, images a row, and side of its pictures in pixels."""

LONGEST, BOX = 960, "#f0e442"
"""Of overlays: longer side in pixels at most, and colour of the box."""


@dataclass(frozen=True, kw_only=True)
class ObjectSettings(command.ComparisonSettings):
    """Find an object in each image without labels, by the similarity of its patches."""

    examples: ClassVar[dict[str, str]] = {"out": "objects/"}

    data: Images
    """An image, a folder, a pattern, a list, or demo; of a folder with images and masks in it, or
    like PASCAL VOC's, what is found is also measured."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for objects.json in the layout of COCO, overlays and a contact sheet."""
    methods: Annotated[tuple[Method, ...], tyro.conf.arg(metavar="METHODS")] = ("ncut", "lost")
    """ncut: normalised cut, as TokenCut; lost: seed expansion. The first finds the objects that are
    written; the others are measured too, where there are masks."""
    features: Literal["auto", "keys", "patches"] = "auto"
    """keys of the last block's attention, as both methods take; or patch tokens after the final
    norm, which is all that convnets and networks of timm have; auto takes keys where there are."""
    center: bool = False
    """Subtract the mean of an image's patches from each of them. To some networks all patches are
    alike, and both methods find the entire image."""
    threshold: Annotated[float, Range(low=-1, high=1)] = 0.2
    """For ncut, cosine similarity above which two patches are alike."""
    k: Count = 100
    """For lost, how many of the least similar patches may join the seed."""
    mass: Annotated[float, Range(above=0, below=1)] = 0.6
    """Share of the attention in the masks that are measured for comparison."""
    size: Count = 480
    """Shorter side of the network's input, to which images are resized; nothing is cropped."""
    keep_aspect: bool = False
    """Keep the ratio of the sides, up to 8; without it, squares, as in the paper."""
    objects: Objects = "class"
    """In VOC: class, one object for each class of an image, or instance."""
    split: str = "val"
    """List of the images that are measured, if there is one."""


def run(settings: ObjectSettings) -> dict[str, Any]:
    """`dino objects`: objects.json, overlays and a sheet; with masks also a table and its JSON.

    Returns:
        By network and method the measures in percent; empty without masks.

    Raises:
        UserError: for weights, images or masks that are missing or inconsistent.
    """
    settings = validated(settings)
    if len({*settings.methods}) != max(1, len(settings.methods)):
        raise UserError("--methods must name ncut or lost, or both, each once")
    check_output(settings.out, folder=True)
    check_outside(settings.out, settings.data)
    if has_masks(settings.data):
        return _measured(settings)
    if settings.baseline or settings.compare:
        raise UserError("--baseline and --compare need masks: give --data with images and masks")
    with process_group(device := pick_device(settings.device)):
        network = settings.networks(device, rgb=True)[command.TRAINED]
        inputs = named_inputs([settings.data], network.preprocessing.pixels)
        images = ImageSet(
            [one.path for one in inputs],
            [one.name for one in inputs],
            lambda index: (_picture(inputs[index]), None),
        )
        found = discover(network, images, settings, title="images", write=True)
        for path in _write(found, network, settings, len(inputs)):
            print_path(path)
    return {}


def _picture(one: NamedInput) -> Image.Image:
    if one.source is None:
        raise UserError(f"{one.path} is a video: save some of its frames as images")
    return as_picture(one.source[one.index])


def _measured(settings: ObjectSettings) -> dict[str, Any]:
    with command.evaluation_run("objects", settings, settings.data, rgb=True) as started:
        scenes = scored_scenes(Path(settings.data), settings.split, settings.objects)
        images = ImageSet(
            [str(scene.image) for scene in scenes],
            [scene.image.stem for scene in scenes],
            lambda index: scenes[index].read(),
        )
        content, files = {}, list[Path]()
        for name, network in started.networks.items():
            trained = name == command.TRAINED
            found = discover(network, images, settings, title=f"{name}, images", write=trained)
            if not found.count:
                raise UserError(f"none of the masks, such as {scenes[0].mask}, holds an object")
            content[name] = {row: summary(of) for row, of in found.agreements.items()}
            files += _write(found, network, settings, len(scenes)) if trained else []
        rows = {
            row if len(content) == 1 else f"{name}: {row}": [f"{of[key]:.1f}" for key in MEASURES]
            for name, by_row in content.items()
            for row, of in by_row.items()
        }
        used = {name: _kind(of, settings.features) for name, of in started.networks.items()}
        kinds = " or ".join(dict.fromkeys(used.values()))
        title = f"objects without labels, in %\n{found.count} images, {settings.size} px, {kinds}"
        scores: dict[str, dict[str, Any]] = {}
        for name, by_row in content.items():
            for row, of in by_row.items():
                for key, label in MEASURES.items():
                    scores.setdefault(f"{label}, {row}", {})[name] = {"percent": of[key]}
        counts = {"images": found.count, "empty": len(scenes) - found.count}
        started.report(
            {"objects": content, "features": used, **counts},
            number_table(title, ["mask", *MEASURES.values()], rows),
            images=found.count,
            scores=scores,
            files=files,
        )
    return content


# --------------------------------------------------------------------------------- all images
@dataclass(frozen=True)
class ImageSet:
    """Images by their index.

    Attributes:
        paths: of all images.
        names: relative paths, without ending, of the files that are written of them.
        read: an RGB picture and its mask, or None where there are no masks.
    """

    paths: list[str]
    names: list[str]
    read: Callable[[int], tuple[Image.Image, Ids | None]]


@dataclass
class Findings:
    """What a network found in some images.

    Attributes:
        agreements: by row of the table, one for each image whose mask holds an object.
        objects: path, size (height, width) and COCO annotation of each image.
        cells: of the contact sheet.
        spare: the cell of the last image, in case that no image for the sheet can be read.
        skipped: images that cannot be read.
    """

    agreements: dict[str, list[Agreement]] = field(default_factory=dict)
    objects: list[tuple[str, tuple[int, int], dict[str, Any]]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    spare: list[Cell] = field(default_factory=list)
    skipped: list[ImageError] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many images the agreements are of."""
        return max(map(len, self.agreements.values()), default=0)

    def join(self, other: Findings) -> None:
        """Add the findings in other images."""
        for row, found in other.agreements.items():
            self.agreements.setdefault(row, []).extend(found)
        self.objects += other.objects
        self.cells += other.cells
        self.spare = other.spare or self.spare
        self.skipped += other.skipped


def discover(
    network: Backbone, images: ImageSet, settings: ObjectSettings, *, title: str, write: bool
) -> Findings:
    """What a network finds in all images, which are divided among the ranks.

    Args:
        network: the network.
        images: where there are masks, every method is measured, and the attention beside them.
        settings: of the command.
        title: of the progress bar.
        write: also make annotations, overlays and cells, by the first method.

    Raises:
        UserError: for an image with a mask that cannot be read.
    """
    extractor = PatchExtractor(network, settings.size, settings.keep_aspect, settings.precision)
    shown = {*spread(len(images.paths), SHEET)}
    mine, found = my_share(range(len(images.paths))), Findings()
    with bar(title, len(mine), shown=ranks().main) as advance:
        for index in mine:
            advance(1)
            try:
                picture, ids = images.read(index)
            except ImageError as error:
                found.skipped.append(error)
                continue
            by_row = discoveries(extractor, picture, settings, measured=ids is not None)
            scores = {}
            if ids is not None and objects_in(ids):
                scores = {row: agreement(one, ids) for row, one in by_row.items()}
                for row, score in scores.items():
                    found.agreements.setdefault(row, []).append(score)
            if write:
                row, one = next(iter(by_row.items()))
                found.objects.append(_annotated(images.paths[index], picture, one))
                overlay = drawn(picture, one)
                save_picture(overlay, settings.out / f"{images.names[index]}-object.png")
                cell = _cell(overlay, Path(images.paths[index]).name, scores.get(row))
                found.spare = [cell]
                found.cells += [cell] if index in shown else []
    everything = Findings()
    for share in gather_objects(found):
        everything.join(share)
    return everything


def discoveries(
    extractor: PatchExtractor, picture: Image.Image, settings: ObjectSettings, *, measured: bool
) -> dict[str, Discovered]:
    """What each method finds in an image, by its name; only the first, unless it is measured.

    Then also, for comparison, the masks of the attention and of the entire image.
    """
    tokens, attention = _described(extractor, picture, settings.features)
    if settings.center:
        tokens = tokens - tokens.mean(dim=(1, 2), keepdim=True)
    found = {}
    for method in settings.methods if measured else settings.methods[:1]:
        if method == "ncut":
            found[METHODS[method]] = normalized_cut(tokens, settings.threshold)
        else:
            found[METHODS[method]] = seed_expansion(tokens, settings.k)
    if measured and attention is not None:
        mask = mass_mask(attention, settings.mass).numpy()
        found[f"{settings.mass:.0%} of attention, mean of heads"] = Discovered(
            mask, stretched(attention.numpy())
        )
    if measured:
        full = np.ones(tokens.shape[1:])
        found["the entire image"] = Discovered(full > 0, full)
    return found


@torch.inference_mode()
def _described(
    extractor: PatchExtractor, picture: Image.Image, kind: str
) -> tuple[Float[Tensor, "D h w"], Float[Tensor, "h w"] | None]:
    """The features of an image's patches, and the mean attention of heads where there is any."""
    backbone, images = extractor.backbone, extractor.prepare(picture)
    with memory_errors("--size"), autocast(images.device, extractor.precision):
        found = backbone.features(images, attention=backbone.heads > 0)
    tokens = found.key_maps if _kind(backbone, kind) == "keys" else found.patches[-1]
    if not tokens.isfinite().all():
        raise UserError("the features hold NaN or infinity: the network has diverged")
    attention = found.attention_maps[0].float().mean(dim=0).cpu() if backbone.heads else None
    return tokens[0].float().cpu(), attention


def _kind(backbone: Backbone, kind: str) -> Literal["keys", "patches"]:
    if kind == "keys" and not backbone.heads:
        raise UserError(f"{backbone.spec['arch']} has no keys: use --features patches")
    return "keys" if backbone.heads and kind != "patches" else "patches"


# ------------------------------------------------------------------------------------- outputs
def _annotated(
    path: str, picture: Image.Image, one: Discovered
) -> tuple[str, tuple[int, int], dict[str, Any]]:
    size = (picture.height, picture.width)
    return path, size, annotation(one.pixels(*size), one.box(*size), one.contrast)


def drawn(picture: Image.Image, one: Discovered) -> Image.Image:
    """A picture, of `LONGEST` pixels at most, that is dim and grey outside of a mask; its box."""
    picture = picture.copy()
    picture.thumbnail((LONGEST, LONGEST))
    size = (picture.height, picture.width)
    result = highlighted(picture, Image.fromarray(one.pixels(*size).astype(np.uint8) * 255))
    left, top, width, height = one.box(*size)
    corners = (left, top, left + width - 1, top + height - 1)
    for color, line in (("black", 4), (BOX, 2)):
        ImageDraw.Draw(result).rectangle(corners, outline=color, width=line)
    return result


def _cell(overlay: Image.Image, name: str, score: Agreement | None) -> Cell:
    if score is None:
        return Cell(overlay, name)
    frame: Frame = "right" if score.localized else "wrong"
    return Cell(overlay, f"{name}\nmask IoU {score.iou:.2f}", frame)


def _write(found: Findings, network: Backbone, settings: ObjectSettings, count: int) -> list[Path]:
    """Write objects.json and the contact sheet (main process only)."""
    if not ranks().main:
        return []
    warn_skipped(found.skipped, count)
    if not found.objects:
        raise UserError(
            f"none of {count:,} images can be used, the first because {found.skipped[0]}"
        )
    entire = sum(one["area"] == height * width for _, (height, width), one in found.objects)
    if 2 * entire > len(found.objects) and not settings.center:
        warn(
            f"{entire:,} of {len(found.objects):,} objects are the entire image, since all of its "
            "patches are alike to this network: try --center"
        )
    listing, sheet = settings.out / "objects.json", settings.out / "sheet.png"
    about = {"skipped": [error.path for error in found.skipped]}
    about |= provenance(network, settings)
    content = dataset(found.objects, settings.data, about)
    atomic_write(listing, json.dumps(content, separators=(",", ":")) + "\n")
    title = (
        f"Objects without labels by {METHODS[settings.methods[0]]}: the mask in colour, the rest "
        "dim and grey; yellow, the box."
    )
    if found.agreements:
        title += " Solid green frame: the box has an IoU above .5 with that of an object."
    cells = found.cells or found.spare
    rows = [cells[start : start + PER_ROW] for start in range(0, len(cells), PER_ROW)]
    save_sheet(sheet, rows, title, TILE, compact=True)
    return [listing, sheet]
