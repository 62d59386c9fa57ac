"""The model card beside every export: what the weights are, their origin, how to use them.

Its text depends on the weights, their run and the options of the export alone, so that the same
export writes the same card. Texts from files are inline code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError, read_json
from dino.models.backbone import Backbone
from dino.weights.files import (
    CONFIG_LIMIT,
    dino_metadata,
    export_metadata,
    is_safetensors,
    read_header,
    tensor_file,
)
from dino.weights.load import fingerprint
from dino.weights.published import CATALOGUE, LICENCE

NOT_MEASURED = frozenset({"weights", "preprocessing", "settings", "device", "versions", "skipped"})
"""Entries of an evaluation's JSON that say how it was measured."""
ROWS = 30
"""Numbers of one evaluation that the card repeats; its file has all of them."""


@dataclass(frozen=True)
class Provenance:
    """Where weights come from, as far as their file and its folder state it.

    Attributes:
        name: the file or folder, or the published name.
        sha256: of all tensors by name and value.
        about: the writer's description: recipe, step, data, k-NN during training.
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
        usage: a snippet that runs in the folder in which the export lies.
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
    """Gather what lies beside `weights`, a path or published name that `backbone` was loaded from.

    An evaluation counts if it names the same hash of the weights, the comparison at the end of a
    run if it names the same step of the same run.
    """
    path, sha256 = Path(weights), fingerprint(backbone)
    if not path.exists():
        published = CATALOGUE[str(weights)]
        known = {"k-NN": published.knn, "linear": published.linear}
        numbers = [(f"{name} top-1 %, ImageNet", n) for name, n in known.items() if n is not None]
        rows = [("published", name, f"{n:g}") for name, n in numbers]
        return Provenance(published.name, sha256, {}, rows, LICENCE)
    folder, about = path if path.is_dir() else path.parent, _about(path)
    config = _json(folder / "config.json")
    of_run = "defining" in config and config.get("about", {}).items() <= about.items()
    rows = []
    for name, k_nn in about.get("measured", {}).items():
        rows.append(("during training", f"k-NN top-1 %, {name}", f"{k_nn:g}"))
    for file in sorted(folder.glob("*.json")):
        content = _json(file)
        measured = content.get("weights")
        same = isinstance(measured, dict) and measured.get("sha256") == sha256
        ends = content.get("checkpoint") == f"step_{about.get('step', -1):08d}"
        if same or (of_run and ends):
            rows += [(file.name, name, value) for name, value in _measures(content)]
    return Provenance(path.name, sha256, about, rows)


def _about(path: Path) -> dict[str, Any]:
    """The description in a file of dino; empty for others."""
    teacher = path / "teacher.safetensors"
    path = teacher if teacher.exists() else path
    if (path / "state.json").exists() or not is_safetensors(path := tensor_file(path)):
        return {}
    header = read_header(path)
    found = dino_metadata(header, path) or export_metadata(header, path)
    about: dict[str, Any] = found.get("about", {})
    return about


def _json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; empty for any other, so that a card is made all the same."""
    try:
        small = path.is_file() and path.stat().st_size <= CONFIG_LIMIT
        content = read_json(path) if small else {}
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def _measures(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    found = [line for key in content.keys() - NOT_MEASURED for line in _numbers(key, content[key])]
    yield from sorted(found)[:ROWS]
    if len(found) > ROWS:
        yield "more", f"{len(found) - ROWS} in the file"
    settings = content.get("settings")
    if isinstance(settings, dict) and "data" in settings:
        yield "measured on", _short(settings["data"])


def _numbers(name: str, item: Any) -> Iterator[tuple[str, str]]:
    if isinstance(item, dict):
        for key, value in item.items():
            yield from _numbers(f"{name} {key}", value)
    elif isinstance(item, bool):
        yield name.replace("_", " "), "yes" if item else "no"
    elif isinstance(item, (int, float)):
        yield name.replace("_", " "), f"{item:,}" if isinstance(item, int) else f"{item:.4g}"


def shareable(about: dict[str, Any]) -> dict[str, Any]:
    """The writer's description without the user's folders."""
    paths = {key: _short(about[key]) for key in ("data", "val") if about.get(key)}
    return {**about, **paths}


def _short(data: Any) -> str:
    """The last two parts of a path: the others are private."""
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
        "data": _short(about["data"]) if about.get("data") else None,
        "step": f"{about['step']:,} of {about['steps']:,}" if "steps" in about else None,
    }
    origin = {
        "weights": source.name,
        **(backbone.origin or {}),
        "SHA-256 of all tensors by name and value": source.sha256,
        "architecture": json.dumps(backbone.spec),
        "written by": f"dino-ssl {_version('dino-ssl')}, PyTorch {_version('torch')}",
    }
    table = ["| file | measure | value |", "|---|---|---|"]
    table += [f"| {' | '.join(map(code, row))} |" for row in source.measures]
    unknown = "No measurement of these weights was found beside them."
    sections = [
        f"# {str(backbone.spec['arch']).removeprefix('timm:')}, pretrained with DINO",
        "An image backbone pretrained without labels by self-distillation (DINO, arXiv "
        f"2104.14294), {count / 1e6:.1f} million parameters, as {notes.title}.",
        f"## Use\n\n```python\n{notes.usage.strip()}\n```",
        "\n".join(f"* {note}" for note in (*notes.notes, describe(notes.preprocessing))),
        f"## Training\n\n{data or 'No description of the training images was given.'}",
        _list(trained),
        "## Measured\n\n" + ("\n".join(table) if source.measures else unknown),
        f"## Licence\n\n{licence or 'Not stated'}.",
        f"## Provenance\n\n{_list(origin)}",
    ]
    return _front_matter(notes, licence) + "\n\n".join(filter(None, sections)) + "\n"


def describe(preprocessing: Preprocessing) -> str:
    """The transform in words."""
    p = preprocessing
    side = "both sides" if p.squash else "the shorter side"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (p.mean, p.std))
    return (
        f"Preprocessing: resize {side} to {p.resize} px ({p.interpolation}, antialiased), crop the "
        f"central {p.crop} x {p.crop} px, divide by 255, subtract the mean ({mean}), divide by the "
        f"standard deviation ({std})."
    )


def code(text: object) -> str:
    """A text from a file as inline code, in which neither HTML nor Markdown has a meaning."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`"


def _list(facts: dict[str, Any]) -> str:
    stated = {name.replace("_", " "): fact for name, fact in facts.items() if fact}
    return "\n".join(f"* {name}: {code(fact)}" for name, fact in stated.items())


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "(from source)"


def _front_matter(notes: FormatNotes, licence: str) -> str:
    if notes.library is None:
        return ""
    name = licence.lower() or "unknown"
    known = re.fullmatch(r"[a-z0-9.-]+", name) is not None
    lines = [
        f"license: {name if known else 'other'}",
        *([] if known else [f"license_name: {json.dumps(licence)}"]),
        f"library_name: {notes.library}",
        "pipeline_tag: image-feature-extraction",
        "tags: [dino, self-supervised-learning, feature-extraction]",
    ]
    return "---\n" + "\n".join(lines) + "\n---\n\n"
