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

from dino.features.command import OptionalImages
from dino.features.index import open_index
from dino.files import UserError, atomic_write, check_output
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import pick_device
from dino.settings import Range, conform, validated
from dino.show.explorer.live_run import LiveRun
from dino.show.explorer.patches import named_images, patch_features
from dino.show.explorer.payload import content
from dino.show.explorer.server import MOST_OPEN, TABLES, Explorer, Served, serve
from dino.show.html import DARK, LIGHT
from dino.weights.load import load

SCRIPTS = ("similarity.js", "tile.js", "page.js")
"""In the order in which they are joined; then come those of a page in one file, or of a served one.
"""

Size = Annotated[int, Range(low=1, high=10_000)]
Port = Annotated[int, Range(low=0, high=65_535)]


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
    images: Any = None,
    out: str | Path | None = None,
    *,
    size: int = 480,
    folder: Any = None,
    index: str | Path | None = None,
    run: str | Path | None = None,
    served: bool = False,
    port: int = 0,
    device: torch.device | str = "auto",
) -> Page | Served:
    """A page in which similar patches of images light up under the pointer.

    With a folder, a run, `served`, or without images it is served on 127.0.0.1, until `stop()` or
    the end of the program, and takes further images.

    Args:
        weights: a network, or what `dino.load` takes.
        images: a file, a folder, a PIL image or an array, or a sequence of these; None for none.
        out: the HTML file to write; None for none.
        size: longer side of the images in pixels, for the network.
        folder: many images, to be indexed (`features.index`), mapped and searched.
        index: folder of the index; by default in the cache.
        run: run folder that may be training: its curves, and its newest teacher.
        served: serve the page also of images alone.
        port: of the served page; 0 for any that is free.
        device: where it runs; a network that is given stays where it is.

    Raises:
        UserError: for weights or images that cannot be used, or a file that cannot be written.
    """
    size, port = conform(size, Size, "size"), conform(port, Port, "port")
    served = served or images is None or folder is not None or run is not None
    if out is not None and served:
        raise UserError("a page in one file (--out) takes images, and neither a folder nor a run")
    if index is not None and folder is None:
        raise UserError("--index needs the folder of images that it is of: add --images DIR")
    if out is not None:
        check_output(out, (".html", ".htm"))
    if not isinstance(weights, Backbone):
        weights = load(weights, pick_device(str(device)))
    if served:
        return _serve(weights, images, size, folder, index, run, port)
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


def _serve(
    backbone: Backbone,
    images: Any,
    size: int,
    folder: Any,
    index: str | Path | None,
    run: str | Path | None,
    port: int,
) -> Served:
    live = None if run is None else LiveRun(run)
    given = [] if images is None else named_images(images, backbone.preprocessing.pixels)
    if len(given) > MOST_OPEN:
        raise UserError(f"{len(given)} images are given: a served page takes up to {MOST_OPEN}")
    found = None if folder is None else open_index(backbone, folder, index)
    return serve(Explorer(backbone.eval(), given, size, found, live), served_document, port)


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
    html, _ = _filled(texts, {**filled, "tables": TABLES}, "embedded.js")
    return html, f"{count}, {accuracy}, {len(html) / 1e6:.1f} MB"


def served_document(about: dict[str, Any]) -> tuple[str, str]:
    """The HTML of a served page and its policy, from what `Explorer.about` returns."""
    texts = {
        "title": "dino explore",
        "about": about["networks"]["weights"],
        "footer": (
            "Computed in this page from rounded features. The page asks only its own server, on "
            "this machine, which keeps uploads in memory."
        ),
    }
    above, below = _asset("served.html").split("<!-- below the images -->")
    return _filled(texts, about, "folder.js", "served.js", above=above, below=below)


def _filled(
    texts: dict[str, str], content: dict[str, Any], *scripts: str, above: str = "", below: str = ""
) -> tuple[str, str]:
    """The HTML of a page and its policy; with controls `above` the images it may ask its server."""
    script, style = "\n".join(map(_asset, (*SCRIPTS, *scripts))), _style()
    pictures, server = ("data: 'self'", "; connect-src 'self'") if above else ("data:", "")
    policy = (
        f"default-src 'none'; img-src {pictures}; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'{server}"
    )
    html = _asset("page.html").format(
        **{name: escape(text) for name, text in texts.items()},
        policy=policy,
        style=style,
        script=script,
        above=above,
        below=below,
        content=_json(content),
    )
    # Names of files may hold bytes that are not UTF-8: they become question marks.
    return html.encode("utf-8", "replace").decode(), policy


def _patches(grid: str) -> int:
    rows, columns = grid.split(" × ")
    return int(rows) * int(columns)


def _asset(name: str) -> str:
    return (files("dino.show.explorer") / name).read_text(encoding="utf-8")


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
    """Similar patches of images light up under the pointer: in one file, or in a served page.

    With --out the page is one file. Without, it is served on this machine until Ctrl-C, and shows
    the map of a folder (--images) and a running training (--run) as well.
    """

    examples: ClassVar[dict[str, str]] = {"out": "page.html"}

    weights: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Run folder, file of weights or published name."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")] = ()
    """Images: files, and folders of few."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The page, one file (.html) that holds all it needs; without, it is served."""
    images: OptionalImages = None
    """Many images to index, map and search."""
    index: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Of the index of --images; by default in the cache (DINO_CACHE)."""
    run: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run folder to watch while it trains."""
    port: Port = 0
    """Of the served page, on 127.0.0.1; 0 for any that is free."""
    size: Size = 480
    """Longer side of the images in pixels, for the network: 60 patches of 8 px."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(settings: ExploreSettings) -> Page | Served:
    """`dino explore`: write the page, print what is in it and its path; or serve it until Ctrl-C.

    Raises:
        UserError: see `explore`.
    """
    settings = validated(settings)
    if settings.out is not None and not settings.data:
        raise UserError("a page in one file needs images: dino explore a.jpg --weights W --out ...")
    page = explore(
        settings.weights,
        settings.data or None,
        settings.out,
        size=settings.size,
        folder=settings.images,
        index=settings.index,
        run=settings.run,
        served=settings.out is None,
        port=settings.port,
        device=settings.device,
    )
    if isinstance(page, Page):
        print(page.summary)
        print(page.path)
    else:
        print(page.address, flush=True)
        page.wait()
    return page
