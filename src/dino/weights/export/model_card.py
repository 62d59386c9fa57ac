"""The model card beside every export: what the weights are, their origin, how to use them.

Its text depends on the weights, their run and the options of the export alone, so that the same
export writes the same card. Texts from files are inline code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path, PurePath
from typing import Any

import torch

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError, read_json
from dino.models.backbone import Backbone
from dino.weights.checkpoint import TRAINING
from dino.weights.files import (
    CONFIG_LIMIT,
    dino_metadata,
    export_metadata,
    is_safetensors,
    read_header,
    tensor_file,
)
from dino.weights.load import fingerprint
from dino.weights.published import CATALOGUE

NOT_MEASURED = frozenset(
    {"weights", "networks", "preprocessing", "settings", "device", "versions", "skipped", "scores"}
)
"""Entries of an evaluation's JSON that are no results, or results that other entries hold too."""
ROWS = 30
"""Largest number of results of one evaluation in a card."""


@dataclass(frozen=True)
class Provenance:
    """Where weights come from, as far as their file and its folder state it.

    Attributes:
        name: the file or folder, or the published name.
        sha256: of all tensors by name and value.
        about: the writer's description: recipe, step, data (without the user's folders), k-NN.
        measures: (file, measure, value) of evaluations of these very weights.
        licence: of published weights.
    """

    name: str
    sha256: str
    about: dict[str, Any]
    measures: list[tuple[str, str, str]]
    licence: str = ""


@dataclass(frozen=True)
class FormatNotes:
    """How to use one format of export.

    Attributes:
        title: of the format, in words.
        usage: a snippet that runs in the folder of the export.
        preprocessing: the transform that belongs to it.
        notes: limits and differences, a sentence each.
        library: the name that model hubs know, for the front matter of a folder.
    """

    title: str
    usage: str
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()
    library: str | None = None


# ------------------------------------------------------------------------------------ the facts
def provenance(weights: str | Path, backbone: Backbone) -> Provenance:
    """Read the files beside `weights`, the path or published name of `backbone`.

    An evaluation counts if it names the same hash of the weights, the comparison at the end of a
    run if it names the same step of the same run.
    """
    path, sha256 = Path(weights), fingerprint(backbone)
    if not path.exists():
        published = CATALOGUE[str(weights)]
        scores = {
            "k-NN top-1 %, ImageNet": published.knn,
            "linear top-1 %, ImageNet": published.linear,
        }
        rows = [("published", *row) for row in _numbers("", scores)]
        return Provenance(published.name, sha256, {}, rows, published.origin.licence)
    folder, about = path if path.is_dir() else path.parent, _about(path)
    scores = _dict(about.get("measured"))
    rows = [("during training", *row) for row in _numbers("k-NN top-1 %,", scores)]
    config = _json(folder / "config.json")
    of_run = "defining" in config and _dict(config.get("about")).items() <= about.items()
    for file in sorted([*folder.glob("*.json"), *folder.glob("results/*.json")]):
        content = _json(file)
        same = _dict(content.get("weights")).get("sha256") == sha256
        last = content.get("checkpoint") == f"step_{about.get('step', -1):08d}"
        if same or (of_run and last):
            rows += [(file.name, *row) for row in _measures(content)]
    public = {key: _short(about[key]) for key in ("data", "val") if about.get(key)}
    return Provenance(path.name, sha256, {**about, **public}, rows)


def _about(path: Path) -> dict[str, Any]:
    """The description in a file of dino; empty for others."""
    teacher = path / "teacher.safetensors"
    path = teacher if teacher.exists() else path
    if (path / "state.json").exists() or not is_safetensors(path := tensor_file(path)):
        return {}
    header = read_header(path)
    return _dict((dino_metadata(header, path) or export_metadata(header, path)).get("about"))


def _json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; empty for any other, so that a card is made all the same."""
    with suppress(UserError):
        if path.is_file() and path.stat().st_size <= CONFIG_LIMIT:
            return _dict(read_json(path))
    return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _measures(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of the results in an evaluation's JSON, and the images that it used."""
    results = {name: value for name, value in content.items() if name not in NOT_MEASURED}
    rows = sorted(_numbers("", results))
    yield from rows[:ROWS]
    if len(rows) > ROWS:
        yield "more", f"{len(rows) - ROWS} in the file"
    if data := _dict(content.get("settings")).get("data"):
        yield "measured on", _short(data)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{name} {key}".strip().replace("_", " "), item)
    elif isinstance(value, (bool, int, float)):
        yield name, f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(data: Any) -> str:
    """The last two names of a path: the others are private."""
    return "/".join(PurePath(str(data)).parts[-2:])


# ------------------------------------------------------------------------------------ the text
def card(
    backbone: Backbone, source: Provenance, notes: FormatNotes, data: str = "", licence: str = ""
) -> str:
    """The card as Markdown, with YAML front matter where the export is a folder for a hub.

    Args:
        backbone: the network.
        source: where its weights come from.
        notes: the format of the export.
        data: the user's description of the training images.
        licence: the user's statement of the licence, for example apache-2.0.
    """
    about, licence = source.about, licence or source.licence
    count = sum(parameter.numel() for parameter in backbone.parameters())
    trained = {
        "recipe": about.get("recipe"),
        "started from": about.get("init.from"),
        "data": about.get("data"),
        "step": f"{about['step']:,} of {about['steps']:,}" if "steps" in about else None,
    }
    version = next((found.version for found in distributions(name="dino-ssl")), "(from source)")
    origin = {
        "weights": source.name,
        **{key: fact for key, fact in (backbone.origin or {}).items() if key not in TRAINING},
        "SHA-256 of all tensors by name and value": source.sha256,
        "architecture": json.dumps(backbone.spec),
        "written by": f"dino-ssl {version}, PyTorch {torch.__version__}",
    }
    table = ["| file | measure | value |", "|---|---|---|"]
    table += [f"| {' | '.join(map(_code, row))} |" for row in source.measures]
    unknown = "No measurement of these weights was found beside them."
    sections = [
        f"# {str(backbone.spec['arch']).removeprefix('timm:')}, pretrained with DINO",
        "An image backbone pretrained without labels (DINO, arXiv 2104.14294), "
        f"{count / 1e6:.1f} million parameters, as {notes.title}.",
        f"## Use\n\n```python\n{notes.usage.strip()}\n```",
        "\n".join(f"* {note}" for note in (*notes.notes, _transform(notes.preprocessing))),
        f"## Training\n\n{data or 'No description of the training images was given.'}",
        _list(trained),
        "## Measured\n\n" + ("\n".join(table) if source.measures else unknown),
        f"## Licence\n\n{licence or 'Not stated'}.",
        f"## Provenance\n\n{_list(origin)}",
    ]
    return _front_matter(notes, licence) + "\n\n".join(filter(None, sections)) + "\n"


def _transform(preprocessing: Preprocessing) -> str:
    p = preprocessing
    side = "both sides" if p.squash else "the shorter side"
    return (
        f"Preprocessing: resize {side} to {p.resize} px ({p.interpolation}, antialiased), crop the "
        f"central {p.crop} x {p.crop} px, scale to 0..1, mean {p.mean}, standard deviation {p.std}."
    )


def _code(text: object) -> str:
    """A text from a file as inline code, in which neither HTML nor Markdown has a meaning."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`"


def _list(facts: dict[str, Any]) -> str:
    stated = {name.replace("_", " "): fact for name, fact in facts.items() if fact}
    return "\n".join(f"* {name}: {_code(fact)}" for name, fact in stated.items())


def _front_matter(notes: FormatNotes, licence: str) -> str:
    if notes.library is None:
        return ""
    name = licence.lower() or "unknown"
    if not re.fullmatch(r"[a-z0-9.-]+", name):
        name = f"other\nlicense_name: {json.dumps(licence)}"
    return f"""---
license: {name}
library_name: {notes.library}
pipeline_tag: image-feature-extraction
tags: [dino, self-supervised-learning, feature-extraction]
---

"""
