"""`dino anomalies`: what looks unlike a folder of normal images, with a heat map of each image.

A memory bank holds patch features of the normal images, few or many. The anomaly of a patch is its
cosine distance to the nearest of them (PatchCore, Roth et al. 2022, as AnomalyDINO, Damm et al.
2025, simplified it); the score of an image is the mean over its most anomalous patches.

Shapes: q patches of an image, n of the bank, D width, h w patches, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from rich.table import Table
from scipy import ndimage
from torch import Tensor

from dino.data.images.contact_sheet import Cell
from dino.data.images.decode import as_picture
from dino.data.images.image_errors import ImageError, left_out
from dino.data.images.map_overlay import overlay
from dino.data.images.masks import files_by_name, read_mask
from dino.data.images.png import save_picture
from dino.data.sampler import spread
from dino.data.sources.base import warn
from dino.data.sources.named_inputs import NamedInput
from dino.data.sources.open import Source, open_source
from dino.features.command import TRAINED, Count, Images, Seed, number_table, save_arrays
from dino.features.contact_sheet import save_sheet
from dino.features.patch_classifiers import PatchExtractor
from dino.features.search import directions, nearest
from dino.features.table import check_finite
from dino.files import UserError, atomic_csv
from dino.jobs.command import JobSettings, job, named_images
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.settings import Range, validated

CPU = torch.device("cpu")

REFERENCE = 32
"""Most normal images that are themselves scored, each without its own patches."""

SHEET, PER_ROW, TILE = 24, 4, 200
"""Most images of the contact sheet, pairs of pictures a row, and their side in pixels."""

BINS = 2**16
"""Of the histograms of distances, which go from 0 to 2."""

PRO_LIMIT = 0.3
"""Rate of false positives up to which the overlap of regions is integrated (Bergmann et al.)."""


# --------------------------------------------------------------------------------- the method
def distances(patches: Float[Tensor, "q D"], bank: Float[Tensor, "n D"]) -> Float[Tensor, " q"]:
    """Cosine distance, 0 to 2, of each patch to the nearest patch of the bank."""
    return 1 - nearest(patches, bank, 1, device=patches.device)[0][:, 0].cpu()


def image_score(anomaly: Float[Tensor, "h w"], share: float) -> float:
    """The mean over this share of the patches, at least one: those of the largest distance."""
    flat = anomaly.flatten()
    return float(flat.topk(max(1, round(share * len(flat)))).values.mean())


@dataclass(frozen=True)
class MemoryBank:
    """Patch features of normal images, of length 1, on the CPU.

    Attributes:
        features: of the patches, image by image.
        image: the index of the image that each patch comes from.
    """

    features: Float[Tensor, "n D"]
    image: Int[Tensor, " n"]

    @classmethod
    def of(
        cls, maps: Iterable[tuple[int, Float[Tensor, "D h w"]]], most: int, seed: int
    ) -> MemoryBank:
        """At most `most` patches of each image, drawn by the seed and the image's index.

        Args:
            maps: index and patch features of each image.
            most: at least 1.
            seed: not negative.
        """
        rows, image = [], []
        for index, tokens in maps:
            flat = tokens.flatten(1).T
            drawn = np.random.default_rng((seed, index)).permutation(len(flat))[:most]
            rows.append(directions(flat[torch.from_numpy(np.sort(drawn))].cpu(), CPU))
            image.append(torch.full((len(drawn),), index))
        return cls(torch.cat(rows), torch.cat(image))

    def without(self, index: int) -> Float[Tensor, "_ D"]:
        """The patches of all other images."""
        return self.features[self.image != index]


# ------------------------------------------------------------------------------- the measures
def auroc(normal: Sequence[float], anomalous: Sequence[float]) -> float:
    """The probability that an anomalous image has the larger score, in percent; ties count half."""
    one, two = np.sort(np.array(normal)), np.array(anomalous)
    below = np.searchsorted(one, two, "left") + np.searchsorted(one, two, "right")
    return 100 * float(below.mean() / (2 * len(one)))


@dataclass
class PixelScores:
    """Histograms of the distances of pixels, from which the measures of heat maps come.

    However many pixels, memory does not grow. Distances that share one of `BINS` bins, 0.00003
    wide, count as equal.

    Attributes:
        normal: pixels outside of all masks, by bin.
        anomalous: pixels inside.
        regions: the share of each connected region, by bin, summed over regions.
        count: regions.
    """

    normal: Float[np.ndarray, " bins"] = field(default_factory=lambda: np.zeros(BINS))
    anomalous: Float[np.ndarray, " bins"] = field(default_factory=lambda: np.zeros(BINS))
    regions: Float[np.ndarray, " bins"] = field(default_factory=lambda: np.zeros(BINS))
    count: int = 0

    def add(self, anomaly: Float[np.ndarray, "H W"], mask: Bool[np.ndarray, "H W"]) -> None:
        """Add an image: its heat map, and where it is anomalous."""
        bins = np.clip(anomaly * (BINS / 2), 0, BINS - 1).astype(np.int64)
        self.normal += np.bincount(bins[~mask], minlength=BINS)
        self.anomalous += np.bincount(bins[mask], minlength=BINS)
        found, count = ndimage.label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(found.ravel(), minlength=count + 1)
        self.regions += np.bincount(bins[mask], 1 / sizes[found[mask]], minlength=BINS)
        self.count += count

    def measures(self) -> dict[str, float]:
        """In percent "pixel_auroc", and "pro": the area under the mean overlap of regions.

        The overlap is averaged over regions, as a function of the share of normal pixels above the
        same threshold, up to 30 % of them; the area is divided by 0.3.
        """
        false, true, overlap = (
            np.concatenate([[0.0], np.cumsum(one[::-1]) / one.sum()])
            for one in (self.normal, self.anomalous, self.regions)
        )
        inside = false <= PRO_LIMIT
        edge = float(np.interp(PRO_LIMIT, false, overlap))
        rates = np.append(false[inside], PRO_LIMIT)
        pro = np.trapezoid(np.append(overlap[inside], edge), rates) / PRO_LIMIT
        return {"pixel_auroc": 100 * float(np.trapezoid(true, false)), "pro": 100 * float(pro)}


# ------------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class Anomalies(JobSettings):
    """Find what looks unlike a folder of normal images."""

    examples: ClassVar[dict[str, str]] = {
        "data": "normal/",
        "queries": "photos/",
        "out": "anomalies",
    }

    data: Images
    """Normal images, few or many: a folder, a list, or demo."""
    queries: Images
    """Images to look at. Where they lie in sub-folders, those of --normal are normal and the others
    are not, which measures the scores."""
    masks: Path | None = None
    """Folder of masks of what is anomalous, to measure the heat maps: named as the images, also
    with _mask at the end, and in the same sub-folders. An image without one is normal."""
    normal: str = "good"
    """The sub-folder of --queries with normal images."""
    size: Annotated[int, Range(low=1, high=10**5)] = 448
    """Shorter side of the network's input in pixels, to which images are resized; nothing is
    cropped. Small defects need a larger one."""
    patches: Count = 100_000
    """Most patches of the bank, drawn evenly from all normal images."""
    top: Annotated[float, Range(above=0, high=1)] = 0.01
    """The score of an image is the mean over this share of its patches."""
    arrays: bool = False
    """Also write the distances of the patches of each image (.npz)."""
    seed: Seed = 0
    """Of the patches that are drawn."""


@dataclass(frozen=True)
class _Result:
    """What one network says.

    Attributes:
        maps: distances of the patches of each image by its index; images that cannot be used lack.
        scores: of the same images.
        normal: scores of some normal images, each against the others.
        measures: in percent, as far as labels allow.
        skipped: the images that cannot be used.
    """

    maps: dict[int, Float[Tensor, "h w"]]
    scores: dict[int, float]
    normal: list[float]
    measures: dict[str, float]
    skipped: list[ImageError]


def run(settings: Anomalies) -> dict[str, Any]:
    """`dino anomalies`: a table, scores.csv, heat maps and a sheet of them, anomalies.json.

    Returns:
        The JSON's "anomalies": by network the measures that labels allow, in percent.

    Raises:
        UserError: for weights, images or masks that cannot be used.
    """
    settings = validated(settings)
    with job("anomalies", settings, settings.data, settings.queries) as started:
        normal = open_source(settings.data, started.pixels)
        queries = named_images([settings.queries], started.pixels)
        masks = _masks(queries, settings)
        labels = _labels(queries, masks, settings)
        found = {
            name: _measured(network, name, normal, queries, labels, masks, settings)
            for name, network in started.networks.items()
        }
        own = found[TRAINED]
        if own.skipped:
            warn(left_out(own.skipped, len(normal) + len(queries)))
        files = _save(own, queries, started.out, settings)
        lines = [f"{len(own.scores):,} images against {len(normal):,} normal images"]
        if own.normal:
            above = sum(score > max(own.normal) for score in own.scores.values())
            lines.append(
                f"{above:,} score above {max(own.normal):.3f}, the largest of {len(own.normal)} "
                "normal images, each against the others"
            )
        measures = {name: one.measures for name, one in found.items()}
        content = {
            "anomalies": measures,
            "images": len(own.scores),
            "normal_images": len(normal),
            "normal_scores": own.normal,
            "skipped": [error.path for error in own.skipped],
        }
        tables = [_table(measures)] if measures[TRAINED] else []
        started.report(content, *tables, *lines, files=files)
    return measures


# ------------------------------------------------------------------------------------- labels
def _masks(queries: Sequence[NamedInput], settings: Anomalies) -> dict[int, Path] | None:
    """The mask of each image that has one, by its index; None without --masks."""
    if settings.masks is None:
        return None
    files = files_by_name(settings.masks)
    found = {
        index: files[name]
        for index, one in enumerate(queries)
        for name in (one.name, f"{one.name}_mask")
        if name in files
    }
    if not found:
        raise UserError(
            f"no mask in {settings.masks} is named as an image of {settings.queries}, such as "
            f"{queries[0].name}: name them alike, also their sub-folders"
        )
    return found


def _labels(
    queries: Sequence[NamedInput], masks: Mapping[int, Path] | None, settings: Anomalies
) -> list[bool] | None:
    """Whether each image is anomalous; None where that is not known."""
    source = queries[0].source
    if source is not None and source.classes is not None and settings.normal in source.classes:
        return [source.class_name(one.index) != settings.normal for one in queries]
    if settings.normal != "good":
        raise UserError(f"{settings.queries} has no sub-folder {settings.normal}: change --normal")
    return None if masks is None else [index in masks for index in range(len(queries))]


# ------------------------------------------------------------------------------------- work
def _measured(
    network: Backbone,
    name: str,
    normal: Source,
    queries: Sequence[NamedInput],
    labels: Sequence[bool] | None,
    masks: Mapping[int, Path] | None,
    settings: Anomalies,
) -> _Result:
    extractor = PatchExtractor(network, settings.size, True, settings.precision)
    skipped: list[ImageError] = []

    def maps(source: Source, indices: Sequence[int], title: str) -> Iterator[tuple[int, Tensor]]:
        with bar(f"{name}, {title}", len(indices)) as advance:
            for index in indices:
                try:
                    yield index, extractor.features(source[index])
                except ImageError as error:
                    skipped.append(error)
                advance(1)

    sampled, tokens = {*spread(len(normal), REFERENCE)}, dict[int, Tensor]()

    def normal_maps() -> Iterator[tuple[int, Tensor]]:
        for index, one in maps(normal, range(len(normal)), "normal images"):
            if index in sampled:
                tokens[index] = one
            yield index, one
        if len(skipped) == len(normal):
            raise UserError(f"none of the normal images can be used, the first: {skipped[0]}")

    bank = MemoryBank.of(normal_maps(), max(1, settings.patches // len(normal)), settings.seed)
    check_finite(bank.features)
    reference = []
    for index, one in tokens.items():
        if len(others := bank.without(index)):
            reference.append(image_score(_distance_map(one, others), settings.top))
    found, pixels = dict[int, Tensor](), PixelScores()
    source = queries[0].source
    assert source is not None
    for index, features in maps(source, range(len(queries)), "images"):
        found[index] = _distance_map(features, bank.features)
    if not found:
        raise UserError(f"none of the images to look at can be used, the first: {skipped[-1]}")
    scores = {index: image_score(one, settings.top) for index, one in found.items()}
    measures = {}
    if labels is not None:
        sides = [[s for i, s in scores.items() if labels[i] is kind] for kind in (False, True)]
        if all(sides):
            measures["auroc"] = auroc(*sides)
        if masks is not None:
            for index, one in found.items():
                if index in masks or not labels[index]:
                    pixels.add(*_with_mask(one, queries[index], masks.get(index)))
            if pixels.count and pixels.normal.any():
                measures |= pixels.measures()
    return _Result(found, scores, reference, measures, skipped)


def _distance_map(
    tokens: Float[Tensor, "D h w"], bank: Float[Tensor, "n D"]
) -> Float[Tensor, "h w"]:
    return distances(tokens.flatten(1).T, bank).unflatten(0, tokens.shape[1:])


def _with_mask(
    anomaly: Float[Tensor, "h w"], one: NamedInput, file: Path | None
) -> tuple[Float[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
    """A heat map enlarged to the size of its image, and where it is anomalous."""
    assert one.source is not None
    with one.source.open(one.index) as image:
        size = image.size
    mask = np.zeros(size, dtype=bool) if file is None else read_mask(file).ids != 0
    if mask.shape != tuple(size):
        raise UserError(
            f"the mask {file} is {mask.shape[1]} x {mask.shape[0]} pixels, but its image "
            f"{one.path} {size[1]} x {size[0]}: make their sizes equal"
        )
    large = F.interpolate(anomaly[None, None], tuple(size), mode="bilinear")[0, 0]
    return large.numpy(), mask


# ------------------------------------------------------------------------------------- files
def _table(measures: Mapping[str, Mapping[str, float]]) -> Table:
    names = {"auroc": "AUROC", "pixel_auroc": "pixel AUROC", "pro": "PRO"}
    shown = [name for name in names if name in measures[TRAINED]]
    rows = {name: [f"{one[key]:.1f}" for key in shown] for name, one in measures.items()}
    return number_table("anomalies, in %", ["features", *(names[key] for key in shown)], rows)


def _save(
    own: _Result, queries: Sequence[NamedInput], out: Path, settings: Anomalies
) -> list[Path]:
    """The list of scores, the heat map of each image and a sheet of the most anomalous."""
    listing, sheet = out / "scores.csv", out / "sheet.png"
    order = sorted(own.scores, key=lambda index: -own.scores[index])
    limit = max(own.normal, default=np.inf)
    rows = (
        (queries[i].path, f"{own.scores[i]:.6f}", "yes" if own.scores[i] > limit else "no")
        for i in order
    )
    atomic_csv(listing, ("path", "score", "above_normal"), rows)
    span = (
        min(float(one.min()) for one in own.maps.values()),
        max(float(one.max()) for one in own.maps.values()),
    )
    cells: list[Cell] = []
    for index in order:
        one = queries[index]
        assert one.source is not None
        picture = as_picture(one.source[one.index])
        heat = overlay(picture, own.maps[index], 0.7, span)
        save_picture(heat, out / f"maps/{one.name}.png")
        if settings.arrays:
            save_arrays(out / f"maps/{one.name}.npz", distance=own.maps[index].numpy())
        if len(cells) < 2 * SHEET:
            cells.append(Cell(picture, f"{one.name}\n{own.scores[index]:.3f}"))
            cells.append(Cell(heat))
    title = (
        f"The {len(cells) // 2} most anomalous of {len(order):,} images, and the distance of their "
        f"patches to the normal ones, from {span[0]:.3f} (black) to {span[1]:.3f} (yellow)."
    )
    per_row = 2 * PER_ROW
    lines = [cells[start : start + per_row] for start in range(0, len(cells), per_row)]
    save_sheet(sheet, lines, title, TILE, compact=True)
    return [listing, sheet, out / "maps"]
