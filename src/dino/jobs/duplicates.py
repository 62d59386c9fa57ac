"""`dino duplicates`: images of a folder that are copies of others, altered or not.

The descriptor is that of copy detection (`dino.features.copy_descriptor`), whitened. All pairs of
images are compared, exactly, in memory that grows only with their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from dino.data.sources.open import Source, open_source
from dino.features.command import OptionalImages
from dino.features.copy_descriptor import descriptor
from dino.features.duplicates import find_duplicates
from dino.features.extractor import extract
from dino.features.table import FeatureTable
from dino.files import UserError
from dino.jobs.command import FeatureJobSettings, job
from dino.models.backbone import Backbone
from dino.runtime import ranks
from dino.settings import Range, validated


@dataclass(frozen=True, kw_only=True)
class FindDuplicates(FeatureJobSettings):
    """Find copies and near duplicates among the images of a folder."""

    threshold: Annotated[float, Range(low=-1, high=1)] = 0.9
    """Cosine similarity, after whitening, from which two images are near duplicates. Lower finds
    stronger alterations, and more pairs that are only similar."""
    whiten_with: OptionalImages = None
    """Images from which whitening is learned; by default those of --data."""
    size: Annotated[int, Range(low=1)] | None = None
    """Images are resized to size x size pixels; as in the paper by default 320 for patches of 8
    pixels, else 224."""

    def descriptors(self, network: Backbone, source: Source, title: str) -> FeatureTable:
        """The descriptors of a source."""
        options = {"batch": self.batch, "title": title, **self.extraction()}
        return extract(network, source, descriptor(network, self.size), **options)


def run(settings: FindDuplicates) -> dict[str, Any]:
    """`dino duplicates`: groups.csv, a sheet of the largest, duplicates.json.

    Returns:
        The JSON's "duplicates": "groups" of paths, and of each the one to "keep".

    Raises:
        UserError: for weights or images that cannot be used, or too few of them.
    """
    settings = validated(settings)
    if settings.baseline or settings.compare:
        raise UserError(
            "duplicates has no measure for --baseline and --compare: see dino evaluate copies "
            "--benchmark"
        )
    with job("duplicates", settings, settings.data, settings.whiten_with) as started:
        source = open_source(settings.data, started.pixels)
        images = settings.descriptors(started.network, source, "images")
        examples = None
        if settings.whiten_with is not None:
            others = open_source(settings.whiten_with, started.pixels)
            examples = settings.descriptors(started.network, others, "whitening").finite()
        if not ranks().main:
            return {}
        listing, sheet = started.out / "groups.csv", started.out / "sheet.png"
        found = find_duplicates(
            images,
            source,
            settings.threshold,
            listing,
            sheet,
            examples=examples,
            device=started.device,
        )
        started.report({"duplicates": found.content}, found.sentence, files=found.files)
    return found.content
