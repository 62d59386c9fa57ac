"""`dino explore`: one file with images, their patch features and the script that compares them.

The page asks for no address: style, script, pictures and features are inside, and its policy
allows nothing else. The cosine similarity of the patch under the pointer to every patch of every
image is computed in the browser.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from dino.data.images.map_overlay import COLORS
from dino.files import atomic_write, check_output
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import pick_device
from dino.settings import Range, conform, validated
from dino.show.explorer.patches import named_images, patch_features
from dino.show.explorer.payload import content
from dino.show.html import DARK, LIGHT
from dino.weights.load import load

SCRIPTS = ("similarity.js", "tile.js", "page.js", "embedded.js")
"""In the order in which they are joined. The last one is only of a page in one file."""

Size = Annotated[int, Range(low=1, high=10_000)]


@dataclass(frozen=True)
class Page:
    """A page of images to explore; Jupyter shows it as the value of a cell.

    Attributes:
        html: the document.
        summary: what is in it, in one sentence.
        path: the file; None if it was not written.
    """

    html: str
    summary: str
    path: Path | None = None

    def __repr__(self) -> str:
        where = "not written" if self.path is None else str(self.path)
        return f"<dino page: {where}; {self.summary}>"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self.html)}" width="100%" height="760" '
            'sandbox="allow-scripts allow-downloads" title="Similar patches"></iframe>'
        )


def explore(
    weights: Backbone | str | Path,
    images: Any,
    out: str | Path | None = None,
    *,
    size: int = 480,
    device: torch.device | str = "auto",
) -> Page:
    """A page in which similar patches of images light up under the pointer.

    Args:
        weights: a network, or what `dino.load` takes.
        images: a file, a folder, a PIL image or an array, or a sequence of these.
        out: the HTML file to write; None for none.
        size: longer side of the images in pixels, for the network.
        device: where it runs; a network that is given stays where it is.

    Raises:
        UserError: for weights or images that cannot be used, or a file that cannot be written.
    """
    size = conform(size, Size, "size")
    if out is not None:
        check_output(out, (".html", ".htm"))
    if not isinstance(weights, Backbone):
        weights = load(weights, pick_device(str(device)))
    samples = named_images(images, weights.preprocessing.pixels)
    found, training = [], weights.training
    try:
        with bar("images", len(samples)) as advance:
            for name, sample in samples:
                found.append(patch_features(weights.eval(), name, sample, size))
                advance(1)
    finally:
        weights.train(training)
    filled = content(found)
    html, summary = document(filled, repr(weights).strip("<>"))
    if out is not None:
        atomic_write(out, html)
    return Page(html, summary, None if out is None else Path(out))


# ------------------------------------------------------------------------------------- the document
def document(filled: dict[str, Any], network: str) -> tuple[str, str]:
    """The HTML of a page and its summary, from what `payload.content` returns."""
    images = filled["images"]
    grids = dict.fromkeys(f"{image['rows']} × {image['columns']}" for image in images)
    grid = next(iter(grids)) if len(grids) == 1 else "up to " + max(grids, key=_patches)
    count = f"{len(images)} image{'s' * (len(images) > 1)} of {grid} patches"
    error = math.ceil(filled["error"] * 1000) / 1000
    accuracy = f"similarities differ by at most {error:.3f} from those in full precision"
    texts = {
        "title": f"dino: {', '.join(image['name'] for image in images)}",
        "about": f"{network} · {count}",
        "footer": (
            f"Computed in this page from rounded features of the last block: {accuracy}, the "
            f"largest of {filled['pairs']:,} pairs of patches. The page needs no network, and "
            "sends nothing."
        ),
    }
    tables = {"similarity": COLORS["inferno"], "attention": COLORS["viridis"]}
    script, style = _script(), _style()
    html = _asset("page.html").format(
        **{name: escape(text) for name, text in texts.items()},
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        content=_json({**filled, "tables": tables}),
    )
    # Names of files may hold bytes that are not UTF-8: they become question marks.
    html = html.encode("utf-8", "replace").decode()
    return html, f"{count}, {accuracy}, {len(html) / 1e6:.1f} MB"


def _patches(grid: str) -> int:
    rows, columns = grid.split(" × ")
    return int(rows) * int(columns)


def _asset(name: str) -> str:
    return (files("dino.show.explorer") / name).read_text(encoding="utf-8")


def _script() -> str:
    return "\n".join(_asset(name) for name in SCRIPTS)


def _style() -> str:
    light = f":root {{ color-scheme: light; {LIGHT} }}\n"
    return f"{light}:root[data-theme=dark] {{ color-scheme: dark; {DARK} }}\n{_asset('page.css')}"


def _hash(text: str) -> str:
    """The hash by which the page's policy allows a script or a style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(value: Any) -> str:
    """JSON that no name of a file can end early."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# ------------------------------------------------------------------------------------- the command
@dataclass(frozen=True, kw_only=True)
class ExploreSettings:
    """Write a page in which similar patches of images light up under the pointer."""

    examples: ClassVar[dict[str, str]] = {"out": "page.html"}

    weights: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Run folder, file of weights or published name."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")]
    """Images: files, and folders of few."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The page, one file (.html) that holds all it needs."""
    size: Size = 480
    """Longer side of the images in pixels, for the network: 60 patches of 8 px."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(settings: ExploreSettings) -> Page:
    """`dino explore`: write the page, print what is in it and its path.

    Raises:
        UserError: see `explore`.
    """
    settings = validated(settings)
    page = explore(
        settings.weights, settings.data, settings.out, size=settings.size, device=settings.device
    )
    print(page.summary)
    print(page.path)
    return page
