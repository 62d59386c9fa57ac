"""Copy detection: from which original an image was made (paper section 4.2.1, Table 4).

Measured on Copydays and folders laid out like it; or, for a user's folder, its groups of near
duplicates as a list and a contact sheet, which `dino duplicates` finds too.

Shapes: q queries, n images, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dino.data.sources.open import Source, open_source
from dino.evaluate import command
from dino.evaluate.retrieval.copydays import Block, open_copydays
from dino.evaluate.retrieval.ranking_metrics import average_precision
from dino.features.command import OptionalImages, number_table
from dino.features.copy_descriptor import descriptor, learned_whitening
from dino.features.duplicates import find_duplicates
from dino.features.extractor import extract
from dino.features.search import nearest
from dino.features.table import FeatureTable
from dino.features.whitening import Covariance
from dino.files import UserError, check_outside
from dino.models.backbone import Backbone
from dino.runtime import ranks
from dino.settings import Range, validated

DEPTH = 20
"""A copy whose original is not among this many neighbours is not found (published code)."""


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
        whitening = learned_whitening(examples, settings.whitening)
        database = whitening(database)
    scores = {}
    for block in blocks:
        queries = settings.extract(network, block.copies, block.name).finite("Copydays")
        queries = queries if whitening is None else whitening(queries)
        precisions = average_precisions(queries, database, block.origins, device)
        scores[block.name] = 100 * sum(precisions) / len(precisions)
    return scores


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
        examples = None
        if training is not None:
            examples = settings.extract(backbone, training, "whitening").finite()
        if not ranks().main:
            return {}
        listing, sheet = (started.path.with_suffix(ending) for ending in (".csv", ".png"))
        found = find_duplicates(
            images,
            source,
            settings.threshold,
            listing,
            sheet,
            examples=examples,
            device=next(backbone.parameters()).device,
        )
        started.report(
            {"duplicates": found.content}, found.sentence, images=len(images), files=found.files
        )
    return found.content
