"""`dino segment`: from a few masks or clicks to the masks of all images.

The patches of the few images are a memory bank with classes; the patches of all images are
classified by a linear layer, or by their nearest neighbours (`dino.features.patch_classifiers`).

Shapes: q patches, D width, K classes, h w patches, H W pixels.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from dino.data.images.contact_sheet import Cell
from dino.data.images.decode import Sample, as_picture
from dino.data.images.image_errors import ImageError, left_out
from dino.data.images.map_overlay import CATEGORIES
from dino.data.images.masks import VOID, Ids, Mask, files_by_name, read_mask, write_mask
from dino.data.sampler import spread
from dino.data.sources.base import warn
from dino.data.sources.named_inputs import NamedInput
from dino.features import patch_classifiers as patches
from dino.features.command import TRAINED, Count, Images, Seed, number_table
from dino.features.contact_sheet import save_sheet
from dino.features.patch_classifiers import Bank, PatchExtractor
from dino.files import UserError, csv_text
from dino.jobs.command import JobSettings, job, named_images
from dino.progress import bar
from dino.settings import Range, validated

SHEET, PER_ROW, TILE = 24, 4, 200
"""Most images of the contact sheet, pairs of pictures a row, and their side in pixels."""

STRENGTH = 0.6
"""Opacity of a class over an image."""


class Example(NamedTuple):
    """An image with its mask."""

    image: NamedInput
    mask: Path

    def read(self) -> tuple[Sample, Ids]:
        """The image and its mask.

        Raises:
            UserError: if one of them cannot be read, or their sizes differ.
        """
        sample, ids = _sample(self.image), read_mask(self.mask).ids
        if ids.shape != _size(sample):
            height, width = _size(sample)
            raise UserError(
                f"the mask {self.mask} is {ids.shape[1]} x {ids.shape[0]} pixels, but its image "
                f"{self.image.path} {width} x {height}: make their sizes equal"
            )
        return sample, ids


class Click(NamedTuple):
    """A pixel, counted from the upper left corner, and its class; 0 is the background."""

    x: int
    y: int
    label: int


def _sample(image: NamedInput) -> Sample:
    assert image.source is not None
    try:
        return image.source[image.index]
    except ImageError as error:
        raise UserError(f"{error}; repair it or remove it from the data") from None


def _size(sample: Sample) -> tuple[int, int]:
    """Height and width."""
    if isinstance(sample, Image.Image):
        return sample.height, sample.width
    return int(sample.shape[1]), int(sample.shape[2])


# ------------------------------------------------------------------------------------- clicks
def read_clicks(path: Path, images: Sequence[NamedInput]) -> dict[int, list[Click]]:
    """The clicks of a CSV file with the columns image, x, y and class, by the index of the image.

    Images are named by their paths, or by the names of their files where these are unique.

    Raises:
        UserError: for another file, an image that is not there, or fewer than two classes.
    """
    counts = Counter(Path(one.path).name for one in images)
    index = {one.path: number for number, one in enumerate(images)}
    for number, one in enumerate(images):
        if counts[name := Path(one.path).name] == 1:
            index.setdefault(name, number)
    found: dict[int, list[Click]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line, row in enumerate(csv.DictReader(file), start=2):
                image = csv_text(row["image"])
                if image not in index:
                    raise UserError(f"{path}, line {line}: there is no image {image} in --data")
                click = Click(int(row["x"]), int(row["y"]), int(row["class"]))
                if not 0 <= click.label < VOID:
                    raise UserError(f"{path}, line {line}: classes go from 0 to {VOID - 1}")
                found.setdefault(index[image], []).append(click)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is no list of clicks: write a CSV file with the columns image, x, y, class"
        ) from None
    if len({click.label for clicks in found.values() for click in clicks}) < 2:
        raise UserError(f"the clicks in {path} have fewer than two classes: 0 is the background")
    return found


def clicked_patches(
    extractor: PatchExtractor, images: Sequence[NamedInput], clicks: Mapping[int, Sequence[Click]]
) -> Bank:
    """The patches under the clicks.

    Raises:
        UserError: if a click lies outside of its image.
    """
    rows, labels = [], []
    for number, of_image in clicks.items():
        sample = _sample(images[number])
        height, width = _size(sample)
        features = extractor.features(sample).cpu()
        _, h, w = features.shape
        for x, y, label in of_image:
            if not (0 <= x < width and 0 <= y < height):
                raise UserError(
                    f"the click {x}, {y} lies outside of {images[number].path}, which has "
                    f"{width} x {height} pixels"
                )
            rows.append(features[:, y * h // height, x * w // width])
            labels.append(label)
    classes = sorted({*labels})
    chosen = torch.tensor([classes.index(label) for label in labels])
    shares = torch.nn.functional.one_hot(chosen, len(classes)).float()
    return Bank(torch.stack(rows), shares, torch.ones(len(rows)), classes)


# ------------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class Segment(JobSettings):
    """Make masks of all images from those of a few, or from clicks."""

    examples: ClassVar[dict[str, str]] = {"out": "segments", "data": "photos/"}

    data: Images
    """Images: a folder, a list, or demo."""
    masks: Path | None = None
    """Folder of masks of a few of the images: indexed or grey PNG files, named as the images, also
    in the same sub-folders; 0 is the background, 255 (where there are other numbers) is void."""
    clicks: Path | None = None
    """Instead, a CSV file with the columns image, x, y and class; 0 is the background."""
    val: Path | None = None
    """Folder of masks of other images, with which the result is compared."""
    method: Literal["linear", "neighbours"] = "linear"
    """How patches are classified: linear, a linear layer; or neighbours, those most similar."""
    size: Annotated[int, Range(low=1, high=10**5)] = 480
    """Shorter side of the network's input in pixels, to which images are resized; nothing is
    cropped."""
    patches: Count = 2**16
    """Most patches of the masks."""
    penalty: Annotated[float, Range(low=0)] = 1e-3
    """For linear, of the squared weights."""
    k: Count = 30
    """For neighbours, how many vote; at most as many as a class has clicks."""
    temperature: Annotated[float, Range(above=0)] = 0.02
    """For neighbours, of the votes: exp(similarity / temperature)."""
    seed: Seed = 0
    """Of the patches that are drawn."""


def run(settings: Segment) -> dict[str, Any]:
    """`dino segment`: a mask of each image, a sheet, segment.json, and a table with --val.

    Returns:
        The JSON's "segment": with --val the results by network, in percent.

    Raises:
        UserError: for weights, images, masks or clicks that cannot be used.
    """
    settings = validated(settings)
    if (settings.masks is None) == (settings.clicks is None):
        raise UserError("give either --masks of some images, or --clicks into some")
    if settings.val is None and (settings.baseline or settings.compare):
        raise UserError("--baseline and --compare need --val, masks to compare with")
    with job("segment", settings, settings.data) as started:
        images = named_images([settings.data], started.pixels)
        examples = _examples(images, settings.masks)
        clicks = {} if settings.clicks is None else read_clicks(settings.clicks, images)
        known = {id(one.image) for one in examples} | {id(images[number]) for number in clicks}
        tested = [one for one in _examples(images, settings.val) if id(one.image) not in known]
        if settings.val is not None and not tested:
            raise UserError(f"{settings.val} has no mask of an image that is no example: add some")
        found: dict[str, Any] = {}
        for name, network in started.networks.items():
            extractor = PatchExtractor(network, settings.size, True, settings.precision)
            if clicks:
                bank = clicked_patches(extractor, images, clicks)
            else:
                bank = patches.training_patches(
                    extractor, examples, settings.patches, settings.seed, name
                )
            scorer = _scorer(bank, settings, started.device)
            if name == TRAINED:
                skipped, sheet = _write(images, extractor, scorer, bank.classes, started.out)
            if tested:
                counts = patches.confusions(
                    extractor, tested, {"": scorer}, bank.classes, f"{name}, comparing"
                )
                found[name] = patches.mean_iou(counts[""])
        if skipped:
            warn(left_out(skipped, len(images)))
        count = sum(map(len, clicks.values()))
        source = f"{count:,} clicks" if clicks else f"{len(examples):,} masks"
        line = f"{len(images) - len(skipped):,} images segmented from {source}"
        content = {
            "segment": found,
            "images": len(images),
            "skipped": [error.path for error in skipped],
            "examples": sorted({images[number].path for number in clicks})
            or [one.image.path for one in examples],
            "compared": len(tested),
        }
        rows = {n: [f"{of['miou']:.1f}", f"{of['accuracy']:.1f}"] for n, of in found.items()}
        title = f"segmentation of {len(tested):,} other images, in %"
        columns = ["features", "mean IoU", "pixels right"]
        tables = [number_table(title, columns, rows)] if found else []
        started.report(content, *tables, line, files=[sheet, started.out / "masks"])
    return found


def _examples(images: Sequence[NamedInput], folder: Path | None) -> list[Example]:
    """The images that have a mask in a folder; none without a folder."""
    if folder is None:
        return []
    files = files_by_name(folder)
    found = [Example(one, files.pop(one.name)) for one in images if one.name in files]
    if files:
        first = next(iter(files.values()))
        raise UserError(
            f"{len(files):,} masks have no image of their name, such as {first}: name masks as "
            "their images, also their sub-folders"
        )
    return found


def _scorer(bank: Bank, settings: Segment, device: torch.device) -> patches.Scorer:
    if settings.method == "linear":
        return patches.linear(bank, settings.penalty, 200, device)
    k = settings.k
    if settings.clicks is not None:  # a class of few clicks would always be outvoted
        k = min(k, int(bank.shares.sum(dim=0).min()))
    return patches.neighbours(bank, k, settings.temperature, device)


def _write(
    images: Sequence[NamedInput],
    extractor: PatchExtractor,
    scorer: patches.Scorer,
    classes: Sequence[int],
    out: Path,
) -> tuple[list[ImageError], Path]:
    """Write the masks and the contact sheet; the images that could not be read."""
    numbers, skipped, cells = np.array(classes, dtype=np.uint8), list[ImageError](), list[Cell]()
    shown = {*spread(len(images), SHEET)}
    with bar("masks", len(images)) as advance:
        for index, one in enumerate(images):
            advance(1)
            assert one.source is not None
            try:
                sample = one.source[one.index]
            except ImageError as error:
                skipped.append(error)
                continue
            features = extractor.features(sample)
            scores = scorer(features.flatten(1).T).T.unflatten(1, features.shape[1:])
            ids = numbers[patches.enlarged(scores, _size(sample))]
            write_mask(Mask(ids, _palette(ids)), out / f"masks/{one.name}.png")
            if index in shown:
                picture = as_picture(sample)
                cells += [Cell(picture, Path(one.path).name), Cell(painted(picture, ids))]
    if not cells:
        raise UserError(f"none of the images can be used, the first: {skipped[0]}")
    title = f"{len(cells) // 2} of {len(images):,} images, and their masks."
    rows = [cells[start : start + 2 * PER_ROW] for start in range(0, len(cells), 2 * PER_ROW)]
    save_sheet(out / "sheet.png", rows, title, TILE, compact=True)
    return skipped, out / "sheet.png"


def _palette(ids: Ids) -> tuple[int, ...]:
    colors = [CATEGORIES[number % len(CATEGORIES)] for number in range(int(ids.max()))]
    return (0, 0, 0, *(level for color in colors for level in color))


def painted(picture: Image.Image, ids: Ids) -> Image.Image:
    """An image with a colour over each class; that of the background stays."""
    levels = np.array(_palette(ids), dtype=np.uint8).reshape(-1, 3)[ids]
    cover = Image.fromarray((ids != 0).astype(np.uint8) * round(255 * STRENGTH))
    return Image.composite(Image.fromarray(levels), picture.convert("RGB"), cover)
