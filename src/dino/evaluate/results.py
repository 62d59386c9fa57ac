"""The files of results: their names, and all results of a run.

Of a run they lie in RUN/results, named by evaluation and data set, such as `knn-photos.json`. A
result is replaced when the same evaluation measures the same images again. Other images of the same
name get another file, `knn-photos-2.json`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from dino.data.sources.folder import SPLITS
from dino.files import UserError, read_json

FOLDER = "results"
"""In a run folder."""


def located(data: str | Path) -> str:
    """What the user calls `--data`, as an absolute path if it exists, also before `?SETTINGS`."""
    path, mark, settings = str(data).partition("?")
    if mark and not os.path.lexists(path):
        return str(data)
    return os.path.abspath(path) + mark + settings if os.path.lexists(path) else path  # noqa: PTH100


def data_name(data: str | Path) -> str:
    """The name of a data set, for people and file names: that of its folder or file.

    A folder that is a split (`photos/train`) has the name of the folder around it.
    """
    path = Path(str(data).partition("?")[0])
    if path.name.lower() in {name for names in SPLITS.values() for name in names}:
        path = path.parent
    return file_name(path.name if path.is_dir() else path.stem)


def file_name(name: str) -> str:
    """A name, which may be a path, without the characters that file names lack."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_")


def default_path(weights: str, name: str) -> Path:
    """Where the result `name` goes by default.

    RUN/results/name.json for a run; RUN/results/name-step_N.json for one of its checkpoints, whose
    folder is deleted as the run goes on; FILE.name.json beside a file; WEIGHTS.name.json in the
    current folder for a published name.
    """
    path = Path(weights)
    if (path / "state.json").exists():
        path = path.resolve()
        return path.parents[1] / FOLDER / f"{name}-{path.name}.json"
    if path.is_dir():
        return path / FOLDER / f"{name}.json"
    if path.is_file():
        return path.with_name(f"{path.name}.{name}.json")
    return Path(f"{file_name(weights)}.{name}.json")


def numbered(path: Path, sources: Sequence[str]) -> Path:
    """`path`, or the first of `path`-2, -3, ... that holds no result of other images."""
    others = (path.with_name(f"{path.stem}-{number}.json") for number in count(2))
    return next(
        candidate
        for candidate in chain([path], others)
        if not candidate.exists() or _content(candidate).get("sources") == [*sources]
    )


def _content(path: Path) -> dict[str, Any]:
    """What a file of JSON holds; empty if it is damaged or no result."""
    with suppress(UserError):
        content = read_json(path)
        if isinstance(content, dict):
            return content
    return {}


def collected(run: str | Path) -> list[dict[str, Any]]:
    """All results of evaluations that lie in a run folder, the earliest first.

    These are the JSON files in RUN/results, and those beside files of weights in RUN. Each entry is
    the content of one file (docs/evaluation.md), with "path" added. The entries that every result
    has, whatever was measured:

    - "evaluation": knn, linear, logistic, finetune, retrieval, neighbours, copies, duplicates,
      segmentation, video or objects;
    - "data": name of the data set; "sources": its folders or files; "written": date and time;
    - "measured_images": how many images the scores are of;
    - "scores": {measure: {network: {"percent": ..., "standard_error": ...}}}, where the error is
      absent for measures without one, a percent may be None, and networks are "trained",
      "untrained", "pixels" or other weights; empty for neighbours and duplicates;
    - "networks": {network: {"file": ..., "recipe": ..., "step": ..., "steps": ...}}, each as far
      as the file of weights states it.

    A file that cannot be read has an entry of "path" and "problem", a sentence. Other JSON is
    ignored.
    """
    folder, found = Path(run), []
    files = [*folder.glob(f"{FOLDER}/*.json"), *folder.glob("*.safetensors.*.json")]
    for path in sorted(files):
        try:
            content = read_json(path)
        except UserError as error:
            found.append({"path": str(path), "problem": str(error)})
            continue
        if isinstance(content, dict) and "evaluation" in content:
            found.append({**content, "path": str(path)})
    return sorted(found, key=lambda entry: str(entry.get("written", "")))
