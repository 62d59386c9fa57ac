"""`dino attention`: what a Vision Transformer attends to in images and videos (Fig. 1, 3, 4, 8).

One image or frame is in memory at a time, with the attention of one query to all patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import tyro
from PIL import Image

from dino.data.images.contact_sheet import Cell
from dino.data.images.decode import Sample, as_picture, read_image
from dino.data.images.image_errors import ImageError
from dino.data.images.patch_grid import patch_input
from dino.data.images.png import save_picture
from dino.data.sources.base import Source, warn
from dino.data.sources.named_inputs import NamedInput, named_inputs
from dino.features.command import print_paths, provenance, save_arrays
from dino.files import UserError, atomic_json, check_output, check_outside
from dino.models.attention import attention_maps
from dino.models.backbone import Backbone, no_attention
from dino.progress import bar
from dino.runtime import Precision, autocast, memory_errors, pick_device
from dino.settings import Form, Range, validated
from dino.show import attention_pictures as drawing
from dino.show.attention_pictures import HeadMaps, Point
from dino.show.legends import below, inside
from dino.show.video_frames import Video, open_video, redraw
from dino.weights.load import load

Output = Literal["sheet", "mean", "best", "heads", "masks", "composite"]

Pixel = Annotated[str, Form(r"\d+,\d+", "X,Y, a column and a row in pixels")]

ROWS = 12
"""Images in a page of the sheet of all images."""


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """Show what a Vision Transformer attends to in images and videos (Fig. 1, 3, 4, 8)."""

    examples: ClassVar[dict[str, str]] = {"data": "photo.jpg", "out": "attention"}

    weights: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Run folder, file of weights or published name."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ...")]
    """Images, videos, folders, patterns such as 'photos/*.jpg', lists, or demo."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the pictures."""
    write: tuple[Output, ...] = ()
    """Of images: sheet (all of the following in one picture; the default). Of images and videos:
    mean (of the heads; the default for videos), best (the most concentrated head), heads (each),
    masks (of the mean and of each head), composite (a colour for each head)."""
    arrays: bool = False
    """Also write the numbers of each image (.npz)."""
    heads: tuple[int, ...] = ()
    """These heads only, counted from 0."""
    block: int = -1
    """Whose attention: counted from 0, or from the end."""
    query: Annotated[Pixel | None, tyro.conf.arg(metavar="X,Y")] = None
    """Attention of the patch at this pixel, counted from the upper left corner; by default of the
    CLS token."""
    mass: Annotated[float, Range(above=0, below=1)] = 0.6
    """Share of the attention that masks hold."""
    size: Annotated[int, Range(low=1, high=10**5)] = 480
    """Shorter side of the network's input, to which images are resized; nothing is cropped."""
    keep_aspect: bool = True
    """Keep the ratio of the sides, up to 8; without it, squares, as in the paper."""
    legend: bool = True
    """Say what colours mean: below pictures, in a corner of videos."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "fp32"
    """Of the network: fp32, or bf16 for speed."""

    @property
    def point(self) -> Point | None:
        """The pixel of the query."""
        if self.query is None:
            return None
        x, y = map(int, self.query.split(","))
        return x, y

    @property
    def of_images(self) -> tuple[Output, ...]:
        """What is written of an image."""
        return self.write or ("sheet",)

    @property
    def of_videos(self) -> tuple[Output, ...]:
        """What is written of a video."""
        return tuple(kind for kind in self.write or ("mean",) if kind != "sheet")


def run(settings: AttentionSettings) -> dict[str, Any]:
    """`dino attention`: pictures, and attention.json with what they show; prints the paths.

    Returns:
        The content of the JSON.

    Raises:
        UserError: for weights or data that do not exist, a network without attention, or a head,
            block or pixel that does not exist.
    """
    settings = validated(settings)
    check_output(settings.out, folder=True)
    for word in settings.data:
        check_outside(settings.out, word)
    viewer = Viewer(load(settings.weights, pick_device(settings.device)), settings)
    inputs = named_inputs(settings.data, viewer.backbone.preprocessing.pixels)
    videos = [(one, open_video(one.path)) for one in inputs if one.source is None]
    if videos and not settings.of_videos:
        raise UserError("--write sheet is for images: add what to write of videos, such as mean")
    if videos and settings.arrays:
        raise UserError("--arrays is for images: leave it out, or leave out the videos")
    if settings.point is not None:
        _check_query(settings.point, inputs, videos)
    images = [one for one in inputs if one.source is not None]
    shown, pages, skipped = _show_images(images, viewer)
    for one, video in videos:
        with bar(f"{Path(one.path).name}, frames", video.frames) as advance:
            shown.append(viewer.show_video(one, video, advance))
    listing = settings.out / "attention.json"
    content = {
        "shown": shown,
        "sheets": [str(path) for path in pages],
        "skipped": [error.path for error in skipped],
        **provenance(viewer.backbone, settings),
    }
    atomic_json(listing, content)
    print_paths([file for facts in shown for file in facts["files"]], [*pages, listing])
    return content


def _check_query(
    point: Point, inputs: Sequence[NamedInput], videos: Sequence[tuple[NamedInput, Video]]
) -> None:
    """Raise `UserError` for the first image or video without this pixel."""
    sizes = [(one.path, video.size) for one, video in videos]
    for one in inputs:
        if one.source is not None:
            with suppress(ImageError), one.source.open(one.index) as image:
                sizes.append((one.path, image.size[::-1]))
    for path, (width, height) in sizes:
        if point[0] >= width or point[1] >= height:
            raise UserError(
                f"--query {point[0]},{point[1]} lies outside of {path}, whose last pixel is "
                f"{width - 1},{height - 1}"
            )


def _show_images(
    images: Sequence[NamedInput], viewer: Viewer
) -> tuple[list[dict[str, Any]], list[Path], list[ImageError]]:
    """Show images one by one, and several of them in the pages of a sheet.

    Returns:
        The facts of each image, the pages, and the errors of images that cannot be read.
    """
    shown: list[dict[str, Any]] = []
    pages: list[Path] = []
    skipped: list[ImageError] = []
    rows: list[list[Cell]] = []
    with bar("images", len(images)) as advance:
        for one in images:
            try:
                facts, cells = viewer.show_image(one)
                shown.append(facts)
                rows += [cells] if cells and len(images) > 1 else []
            except ImageError as error:
                skipped.append(error)
            if rows and (len(rows) == ROWS or one is images[-1]):
                number = f"-{len(pages) + 1}" if pages else ""
                pages.append(viewer.settings.out / f"sheet{number}.png")
                save_picture(drawing.sheet(rows, viewer.title()), pages[-1])
                rows.clear()
            advance(1)
    if skipped:
        count = f"{len(skipped):,} of {len(images):,} images cannot be used"
        first = skipped[0] if len(images) == 1 else f"{count}, the first: {skipped[0]}"
        if not shown:
            raise UserError(str(first))
        warn(f"{first}; attention.json lists them")
    return shown, pages, skipped


class Viewer:
    """Shows the attention of a network as the settings say.

    Raises:
        UserError: if the network has no attention, or not these heads.
    """

    def __init__(self, backbone: Backbone, settings: AttentionSettings) -> None:
        if not backbone.heads:
            raise no_attention(backbone.spec["arch"])
        if wrong := [head for head in settings.heads if not 0 <= head < backbone.heads]:
            last = backbone.heads - 1
            raise UserError(f"there is no head {wrong[0]}: the network has heads 0 to {last}")
        self.backbone, self.settings = backbone, settings
        self.heads = list(dict.fromkeys(settings.heads)) or list(range(backbone.heads))

    def look(self, sample: Sample) -> HeadMaps:
        """The attention in an image."""
        settings, transform = self.settings, self.backbone.preprocessing
        device, patch = next(self.backbone.parameters()).device, self.backbone.patch_size or 1
        keep_aspect = settings.keep_aspect
        images = patch_input(sample, settings.size, patch, keep_aspect, transform, device)
        query = None
        if settings.point is not None:
            (x, y), (width, height) = settings.point, as_picture(sample).size
            query = (
                y * (images.shape[2] // patch) // height,
                x * (images.shape[3] // patch) // width,
            )
        with memory_errors("--size"), autocast(device, settings.precision):
            maps = attention_maps(self.backbone, images, settings.block, query)[0, self.heads]
        if not maps.isfinite().all():
            raise UserError("the attention holds NaN or infinity: the network has diverged")
        return HeadMaps(maps.float().cpu(), self.heads, settings.mass)

    def show_image(self, one: NamedInput) -> tuple[dict[str, Any], list[Cell]]:
        """Write what is requested of an image.

        Returns:
            Its facts, and its cells in the sheet of all images; none if no sheet is requested.

        Raises:
            ImageError: if it cannot be read.
        """
        settings, kinds = self.settings, self.settings.of_images
        sample = cast(Source, one.source)[one.index]
        image, found = as_picture(sample), self.look(sample)
        cells: list[Cell] = []
        files: list[Path] = []

        def file(ending: str) -> Path:
            files.append(settings.out / f"{one.name}{ending}")
            return files[-1]

        if "sheet" in kinds:
            cells = drawing.summary(image, Path(one.path).name, found, settings.point)
            rows = [cells, *drawing.head_rows(image, found)]
            save_picture(drawing.sheet(rows, self.title(found)), file("-sheet.png"))
        for name, picture, legend in drawing.pictures(image, found, kinds, settings.point):
            labelled = below(picture, legend) if legend and settings.legend else picture
            save_picture(labelled, file(f"-{name}.png"))
        if settings.arrays:
            maps, masks, heads = found.maps.numpy(), found.masks.numpy(), np.array(self.heads)
            save_arrays(file(".npz"), attention=maps, masks=masks, heads=heads)
        return self.facts(one, image.size, found, files), cells

    def show_video(
        self, one: NamedInput, video: Video, advance: Callable[[int], object]
    ) -> dict[str, Any]:
        """Write what is requested of a video, whose best head is that of the first frame."""
        settings, pixels = self.settings, self.backbone.preprocessing.pixels
        first: list[HeadMaps] = []

        def draw(frame: Image.Image) -> Iterator[tuple[str, Image.Image]]:
            found = self.look(read_image(frame, one.path, pixels))
            first[:] = first or [found]
            kinds, best = settings.of_videos, first[0].best
            shown = drawing.pictures(frame, found, kinds, settings.point, best)
            for name, picture, legend in shown:
                yield name, inside(picture, legend) if legend and settings.legend else picture

        def target(name: str) -> Path:
            return settings.out / f"{one.name}-{name}.mp4"

        count, files = redraw(video, target, draw, advance)
        facts = self.facts(one, video.size, first[0], files)
        return {**facts, "frames": count, "frames_per_second": float(video.rate or 0) or None}

    def title(self, found: HeadMaps | None = None) -> str:
        """What a sheet of one image, or of several, shows."""
        settings, depth, patch = self.settings, self.backbone.depth, self.backbone.patch_size
        query = f"the patch at pixel {settings.query}" if settings.query else "the CLS token"
        grid = ""
        if found is not None:
            grid = " to {} x {} patches of {} px".format(*found.maps.shape[1:], patch)
        return (
            f"Attention of {query}{grid}, block {settings.block % depth} of 0 to {depth - 1}. In "
            "each map black is the least and yellow the most, as a share of the attention; inside "
            f"the white line lie the fewest patches with {100 * settings.mass:g} %. "
            f"Weights: {self.backbone.loaded or settings.weights}."
        )

    def facts(
        self, one: NamedInput, size: tuple[int, int], found: HeadMaps, files: Sequence[Path]
    ) -> dict[str, Any]:
        """What is shown, as JSON takes it."""
        areas = zip(found.heads, found.areas, strict=True)
        return {
            "path": one.path,
            "width": size[0],
            "height": size[1],
            "grid": [*found.maps.shape[1:]],
            "most_concentrated_head": found.heads[found.best],
            "mask_areas": {"mean": found.mean.areas[0], **{f"head{n}": area for n, area in areas}},
            "files": [str(file) for file in files],
        }
