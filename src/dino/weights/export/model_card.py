"""The model card beside every export: what the weights are, where they come from, how to use them.

Its text depends on the weights, their run and the user's words alone, so that the same export
writes the same card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError, read_json
from dino.models.backbone import Backbone
from dino.weights.files import TENSOR_FILES, dino_metadata, is_safetensors, read_header
from dino.weights.load import fingerprint
from dino.weights.published import CATALOGUE, LICENCE, Published

NOT_MEASURED = frozenset({"weights", "preprocessing", "settings", "device", "versions", "skipped"})
"""Entries of an evaluation's JSON that say how it was measured."""

ROWS = 30
"""Measures of one file that the card repeats; the file has them all."""

LARGEST = 2**20
"""Bytes of a JSON file that may be an evaluation's."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from, as far as their file and its neighbours tell.

    Attributes:
        name: what the user called them.
        sha256: of all tensors by name and value.
        about: what their writer said: recipe, step, data, k-NN on the way.
        settings: the settings that define their run; empty where there is no run beside them.
        measures: (file, measure, value) of evaluations of these very weights.
        licence: of published weights.
    """

    name: str
    sha256: str
    about: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    measures: list[tuple[str, str, str]] = field(default_factory=list)
    licence: str = ""


@dataclass(frozen=True)
class Words:
    """What only the user knows.

    Attributes:
        data: a description of the training images; empty if none was given.
        licence: of the weights, for example apache-2.0; empty if none was given.
    """

    data: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Contents:
    """What an export holds and how to load it.

    Attributes:
        title: of the format, in words.
        usage: a snippet that runs, from the folder in which the export lies.
        preprocessing: the transform that belongs to it.
        notes: sentences on what to mind.
        library: the name that model hubs know, for the front matter of a folder.
    """

    title: str
    usage: str
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()
    library: str | None = None


# ------------------------------------------------------------------------------------ the facts
def origin(weights: str | Path, backbone: Backbone) -> Origin:
    """Gather what lies beside `weights`: the run's settings and evaluations of these weights.

    An evaluation counts if it names the same hash of the weights, the comparison at the end of a
    run if it names the same step.

    Args:
        weights: what the user gave: a run folder, a file, or a published name.
        backbone: the network that was loaded from it.
    """
    path, sha256 = Path(weights), fingerprint(backbone)
    if not path.exists():
        return _published(CATALOGUE[str(weights)], sha256)
    folder = path if path.is_dir() else path.parent
    about = _about(path)
    config = _json(folder / "config.json")
    own = config.get("about", {}).items() <= about.items() if "defining" in config else False
    measures = []
    for file in sorted(folder.glob("*.json")):
        content = _json(file) if file.stat().st_size <= LARGEST else {}
        hashed = content.get("weights", {})
        same = isinstance(hashed, dict) and hashed.get("sha256") == sha256
        ends = content.get("checkpoint") == f"step_{about.get('step', -1):08d}"
        if same or (own and ends):
            measures += [(file.name, name, value) for name, value in _measures(content)]
    settings = config["defining"] if own else {}
    return Origin(str(weights), sha256, about, settings, measures)


def _published(weights: Published, sha256: str) -> Origin:
    """What the authors say of the weights that they published."""
    known = {"k-NN": weights.knn, "linear": weights.linear}
    measures = [
        ("published", f"{name} top-1 %, ImageNet", f"{value:g}")
        for name, value in known.items()
        if value is not None
    ]
    return Origin(weights.name, sha256, measures=measures, licence=LICENCE)


def _about(path: Path) -> dict[str, Any]:
    """What the writer of the file said, if dino wrote it; else nothing."""
    if path.is_dir():
        names = ("teacher.safetensors", *TENSOR_FILES)
        path = next((path / name for name in names if (path / name).exists()), path)
    if path.is_dir() or not is_safetensors(path):
        return {}
    header = read_header(path)
    own = dino_metadata(header, path) or json.loads(header.get("dino_export", "{}"))
    return own.get("about", {})


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none: a card is made all the same."""
    try:
        content = read_json(path)
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
    """What the writer of the weights said, without the user's folders."""
    paths = {key: _short(about[key]) for key in ("data", "val") if about.get(key)}
    return {**about, **paths}


def _short(data: Any) -> str:
    """The last two parts of a path: the rest is nobody else's business."""
    return "/".join(PurePath(str(data)).parts[-2:])


# ------------------------------------------------------------------------------------ the text
def card(backbone: Backbone, came: Origin, contents: Contents, words: Words) -> str:
    """The card as Markdown, with YAML front matter where the export is a folder for a hub."""
    words = replace(words, licence=words.licence or came.licence)
    sections = [
        f"# {_title(backbone)}, pretrained with DINO",
        f"{_what(backbone)} This is its export as {contents.title}.",
        "## Use",
        f"```python\n{contents.usage.strip()}\n```",
        "\n".join(f"* {note}" for note in contents.notes),
        "## Preprocessing",
        describe(contents.preprocessing),
        "## Training",
        _training(came, words),
        "## Measured",
        _measured(came),
        "## Licence",
        f"{words.licence or 'Not stated'}.",
        "## Provenance",
        _provenance(backbone, came),
    ]
    return _front_matter(contents, words) + "\n\n".join(filter(None, sections)) + "\n"


def describe(preprocessing: Preprocessing) -> str:
    """The transform in words."""
    p = preprocessing
    return (
        f"Resize the shorter side to {p.resize} px ({p.interpolation}, antialiased, as Pillow "
        f"does), crop the central {p.crop} x {p.crop} px, divide by 255, subtract the mean "
        f"{_list(p.mean)} and divide by the standard deviation {_list(p.std)} of each channel."
    )


def _list(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _title(backbone: Backbone) -> str:
    arch = str(backbone.spec["arch"]).removeprefix("timm:")
    return f"{arch}, patch {backbone.patch_size}" if backbone.patch_size else arch


def _what(backbone: Backbone) -> str:
    count = sum(parameter.numel() for parameter in backbone.parameters())
    described = "; ".join(f"{name}: {value}" for name, value in backbone.describe().items())
    return (
        "An image backbone trained without labels by self-distillation (DINO, arXiv 2104.14294): "
        f"{count / 1e6:.1f} million parameters; {described}. It has no classifier."
    )


def _training(came: Origin, words: Words) -> str:
    about = came.about
    lines = [words.data or "No description of the training images was given."]
    facts = {
        "recipe": about.get("recipe"),
        "begun with": about.get("init.from"),
        "images": f"{came.settings['data.images']:,}" if "data.images" in came.settings else None,
        "name of the images": _short(about["data"]) if about.get("data") else None,
        "step": f"{about['step']:,} of {about['steps']:,}" if "steps" in about else None,
    }
    lines.append("\n".join(f"* {name}: {fact}" for name, fact in facts.items() if fact))
    if came.settings:
        lines += [
            "Settings that define the run:",
            "\n".join(["```", *(f"{k}: {json.dumps(v)}" for k, v in came.settings.items()), "```"]),
        ]
    return "\n\n".join(line for line in lines if line)


def _measured(came: Origin) -> str:
    measured = came.about.get("measured", {})
    rows = [("while training", f"k-NN top-1 %, {k}", f"{value:g}") for k, value in measured.items()]
    rows += came.measures
    if not rows:
        return "No measurement of these weights was found beside them."
    table = ["| file | measure | value |", "|---|---|---|"]
    return "\n".join(table + [f"| {' | '.join(row)} |" for row in rows])


def _provenance(backbone: Backbone, came: Origin) -> str:
    read = backbone.origin or {}
    return "\n".join(
        [
            f"* weights: {Path(came.name).name}",
            *(f"* {key.replace('_', ' ')}: `{value}`" for key, value in read.items()),
            f"* SHA-256 of all tensors by name and value: `{came.sha256}`",
            f"* architecture: `{json.dumps(backbone.spec)}`",
            f"* written by dino-ssl {_version('dino-ssl')} with PyTorch {_version('torch')}",
        ]
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "(from source)"


def _front_matter(contents: Contents, words: Words) -> str:
    if contents.library is None:
        return ""
    licence = words.licence.lower() or "unknown"
    named = [] if re.fullmatch(r"[a-z0-9.-]+", licence) else [json.dumps(words.licence)]
    lines = [
        f"license: {'other' if named else licence}",
        *(f"license_name: {name}" for name in named),
        f"library_name: {contents.library}",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in ("dino", "self-supervised-learning", "feature-extraction")),
    ]
    return "---\n" + "\n".join(lines) + "\n---\n\n"
