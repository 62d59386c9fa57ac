"""`dino map`: all images of a folder on a plane, similar ones near one another, as one HTML file.

The places are those of `dino.features.folder_map`: t-SNE, in bounded time and memory.

Shapes: n images.
"""

from __future__ import annotations

import base64
import colorsys
import io
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageOps

from dino.data.images.decode import as_picture
from dino.data.sampler import spread
from dino.data.sources.open import Source, open_source
from dino.features.command import TRAINED, Count, number_table
from dino.features.folder_map import placed
from dino.features.search import directions
from dino.features.table import FeatureTable
from dino.files import atomic_csv, atomic_write
from dino.jobs.command import IndexedJobSettings, job
from dino.progress import bar
from dino.runtime import ranks
from dino.settings import validated

LIGHT = "--ground: #fbfaf7; --ink: #1d1f24; --soft: #5d636e; --trained: #1f63c6;"
DARK = "--ground: #14161a; --ink: #e9e9e6; --soft: #a3a8b2; --trained: #79abff;"
"""The colours of the page on a light and on a dark screen."""

THUMBNAIL = 88
"""Side of a thumbnail in pixels; it is shown at half of them, and enlarged under the pointer."""

NEIGHBOURS = 10
"""Nearest images on the map whose classes are compared."""


@dataclass(frozen=True, kw_only=True)
class Map(IndexedJobSettings):
    """Show a folder of images on a plane, similar ones near one another."""

    examples: ClassVar[dict[str, str]] = {"out": "map"}

    thumbnails: Count = 1000
    """Most images that the page shows, evenly spread over all; each takes about 4 kB. The list has
    the places of all."""


def run(settings: Map) -> dict[str, Any]:
    """`dino map`: map.html, map.csv with the place of each image, map.json.

    Returns:
        The JSON's "map"; for images with classes, by network in percent, how many of the ten
        nearest on the map have the image's class.

    Raises:
        UserError: for weights or images that cannot be used.
    """
    settings = validated(settings)
    with job("map", settings, settings.data) as started:
        source = open_source(settings.data, started.pixels)
        tables = {n: settings.images(n, of, source) for n, of in started.networks.items()}
        if not ranks().main:
            return {}
        places = {
            name: placed(directions(table.finite(), torch.device("cpu")))
            for name, table in tables.items()
        }
        images, own = tables[TRAINED], places[TRAINED]
        content: dict[str, Any] = {"images": len(images)}
        printed = []
        if images.labels is not None and len(images) > 1:
            content["same_class"] = {
                name: same_class(place, np.asarray(tables[name].labels))
                for name, place in places.items()
            }
            rows = {name: [f"{value:.1f}"] for name, value in content["same_class"].items()}
            title = f"of the {NEIGHBOURS} nearest on the map, those of an image's class, in %"
            printed.append(number_table(title, ["features", "same class"], rows))
        listing, page = started.out / "map.csv", started.out / "map.html"
        names = [source.class_name(index) for index in images.indices or range(len(images))]
        lines = (
            (path, f"{x:.6f}", f"{y:.6f}", name)
            for path, (x, y), name in zip(images.paths, own.tolist(), names, strict=True)
        )
        atomic_csv(listing, ("path", "x", "y", "class"), lines)
        chosen = spread(len(images), settings.thumbnails)
        atomic_write(page, _page(settings.data, source, images, own, names, chosen))
        started.report({"map": content}, *printed, files=[listing, page])
    return content


def same_class(places: Float[np.ndarray, "n 2"], labels: Int[np.ndarray, " n"]) -> float:
    """How many of the nearest images on the map have the class of the image, in percent."""
    from sklearn.neighbors import NearestNeighbors

    k = min(NEIGHBOURS, len(places) - 1)
    index = NearestNeighbors(n_neighbors=k).fit(places).kneighbors(return_distance=False)
    return 100 * float((labels[index] == labels[:, None]).mean())


def _page(
    data: str,
    source: Source,
    table: FeatureTable,
    places: Float[np.ndarray, "n 2"],
    classes: list[str],
    chosen: list[int],
) -> str:
    """The HTML page with the chosen rows."""
    images = []
    rows = table.indices or range(len(table))
    with bar("thumbnails", len(chosen)) as advance:
        for row in chosen:
            x, y = places[row].tolist()
            images.append(
                {
                    "name": table.paths[row],
                    "class": classes[row],
                    "x": round(x, 5),
                    "y": round(y, 5),
                    "picture": _thumbnail(as_picture(source[rows[row]])),
                }
            )
            advance(1)
    names = sorted({name for name in classes if name})
    shown = f"{len(chosen):,} of {len(table):,} images"
    values = {
        "title": escape(f"Map of {data}"),
        "light": LIGHT,
        "dark": DARK,
        "note": f"{shown}; point at one for its name.",
        "images": _in_script(images),
        "colors": _in_script({name: _color(i) for i, name in enumerate(names)}),
    }
    page = (Path(__file__).parent / "map.html").read_text(encoding="utf-8")
    for name, value in values.items():
        page = page.replace(f"{{{name}}}", value)
    return page


def _in_script(content: Any) -> str:
    """JSON that may stand in a script: no name can end it."""
    return json.dumps(content).replace("<", "\\u003c")


def _color(number: int) -> str:
    """A hue; those of successive numbers are far apart."""
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, 0.5, 0.75)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _thumbnail(picture: Image.Image) -> str:
    """A square as a data URL."""
    file = io.BytesIO()
    ImageOps.fit(picture.convert("RGB"), (THUMBNAIL, THUMBNAIL)).save(file, "jpeg", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
