"""The page of `dino explore` on a server of this machine: uploads, a folder, a running training.

The server listens on 127.0.0.1 below a path that nobody can guess, answers only requests that name
it as their host and come from its own page, and reads no file but the images of the given folder,
by their row, and the files of the run. It stores nothing but the index.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from PIL import Image

from dino.data.images.decode import Sample, as_picture, open_image
from dino.data.images.map_overlay import COLORS
from dino.data.sources.base import needs_extra
from dino.features.folder_map import LANDMARKS, folder_map
from dino.features.index import Index
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.models.inputs import read_sample
from dino.show.explorer.live_run import LiveRun
from dino.show.explorer.opened import MOST_BYTES, OpenedImages
from dino.show.explorer.patches import PatchFeatures, check_patches, patch_features
from dino.show.explorer.payload import content

MOST_OPEN = 12
"""Images that a served page shows at once."""

PATCHES = 60
"""Patches on a side at the largest size: attention grows with the fourth power of it."""

THUMBNAIL = 128
"""Longer side of the thumbnails, in pixels."""

MOST_ROWS = 2_000_000
"""Rows of one list that is written."""

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

CACHED = 24
"""Features of images that are kept."""

HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Explorer:
    """What the page asks for, without HTTP. One request computes at a time.

    Args:
        backbone: in evaluation mode; that of the index.
        given: images that the page shows at first.
        size: of images for the network, in pixels.
        index: of a folder.
        run: that may be training.
    """

    def __init__(
        self,
        backbone: Backbone,
        given: Sequence[tuple[str, Sample]] = (),
        size: int = 480,
        index: Index | None = None,
        run: LiveRun | None = None,
    ) -> None:
        self.backbone, self.size, self.index, self.run = backbone, size, index, run
        self.images = OpenedImages(given, index, backbone.preprocessing.pixels)
        self.device = next(backbone.parameters()).device
        self._computing, self._watching = threading.Lock(), threading.Lock()
        self._teacher: tuple[str | None, Backbone | None] = (None, None)
        self._found: OrderedDict[tuple[Any, ...], PatchFeatures] = OrderedDict()
        self.placing: threading.Thread | None = None
        self._places: Any = None

    def warm_up(self) -> None:
        """Do what only the first request waits for: imports, and the preparation of libraries."""
        with suppress(Exception), self._computing:  # the first request says what is wrong
            pixels = self.backbone.preprocessing.pixels
            sample = read_sample(np.zeros((64, 64, pixels.channels), np.uint8), pixels)
            content(
                [patch_features(self.backbone, "", sample, 4 * (self.backbone.patch_size or 16))]
            )
            if self.index is not None:
                self.backbone.embed([np.zeros((64, 64, pixels.channels), np.uint8)])

    # ------------------------------------------------------------------------ the page's parts
    def about(self) -> dict[str, Any]:
        """What the page knows when it starts."""
        patch = self.backbone.patch_size or 32
        index = self.index
        return {
            "networks": {
                "weights": repr(self.backbone).strip("<>"),
                **({} if self.run is None else {"run": f"newest teacher of {self.run.folder}"}),
            },
            "size": {"value": self.size, "step": patch, "most": max(self.size, PATCHES * patch)},
            "depth": self.backbone.depth,
            "given": [f"given-{number}" for number in range(len(self.images.given))],
            "most": MOST_OPEN,
            "bytes": MOST_BYTES,
            "folder": None
            if index is None
            else {
                "count": len(index),
                "root": index.root,
                "version": index.about["id"],
            },
            "run": None if self.run is None else str(self.run.folder),
        }

    def patches(self, keys: Sequence[str], network: str, size: int, block: int) -> dict[str, Any]:
        """The content of the page (`payload.content`) for some images.

        Args:
            keys: of images.
            network: "weights", or "run" for the newest teacher of the run.
            size: of the images, in pixels.
            block: from 1; 0 for the last.
        """
        if len(keys) > MOST_OPEN:
            raise UserError(f"a page shows {MOST_OPEN} images at once: close one of them")
        images = [self.images.image(key) for key in keys]
        with self._computing:
            version, backbone = self._network(network)
            check_patches(images, size, backbone.patch_size or 32)
            block = min(block, backbone.depth) or backbone.depth
            shown = backbone.first_blocks(block) if backbone.depth else backbone
            found = []
            for key, (name, sample) in zip(keys, images, strict=True):
                cached = (version, key, size, block)
                if cached not in self._found:
                    self._found[cached] = patch_features(shown, name, sample, size)
                self._found.move_to_end(cached)
                found.append(self._found[cached])
                while len(self._found) > CACHED:
                    self._found.popitem(last=False)
            about = {"network": repr(backbone).strip("<>"), "depth": backbone.depth, "block": block}
            if not found:
                return {**about, "images": [], "heads": 0, "tables": TABLES}
            filled = content(found)
            for key, image in zip(keys, filled["images"], strict=True):
                image["key"] = key
            return {**filled, **about, "tables": TABLES}

    def _network(self, name: str) -> tuple[str, Backbone]:
        if name == "weights":
            return "weights", self.backbone
        if name != "run" or self.run is None:
            raise UserError("there is no such network")
        version = self.run.teacher()
        if self._teacher[0] != version or self._teacher[1] is None:
            self._teacher = (version, self.run.load_teacher(self.device))
        version, backbone = self._teacher
        assert backbone is not None
        return f"run {version}", backbone

    def neighbours(self, key: str, count: int) -> list[dict[str, Any]]:
        """The images of the folder that are most similar to one: "row", "name", "cosine"."""
        index = self._index()
        _, sample = self.images.image(key)
        own = int(key.removeprefix("row-")) if key.startswith("row-") else None
        with self._computing:
            if own is not None:
                feature = index.features[own : own + 1]
            else:
                feature = torch.from_numpy(self.backbone.embed([sample]))
            cosines, rows = index.nearest(feature, count, skip=own)
        return [
            {"row": row, "name": index.name(row), "cosine": cosine}
            for row, cosine in zip(rows[0].tolist(), cosines[0].tolist(), strict=True)
        ]

    def _index(self) -> Index:
        if self.index is None:
            raise UserError("no folder is indexed: start dino explore with --images DIR")
        return self.index

    def places(self) -> dict[str, Any] | bytes:
        """The map: uint16 x and y of each image, or how far it is."""
        index = self._index()
        with self._watching:
            if self._places is None and self.placing is None:
                self.placing = threading.Thread(target=self._place, args=(index,), daemon=True)
                self.placing.start()
        if isinstance(self._places, UserError):
            raise self._places
        if self._places is None:
            return {"placing": min(len(index), LANDMARKS)}
        return bytes(self._places)

    def _place(self, index: Index) -> None:
        try:
            self._places = (folder_map(index) * 65535).round().astype("<u2").tobytes()
        except Exception as error:  # the page says why, and works without its map
            self._places = UserError(f"the map cannot be made: {error}")

    def thumbnail(self, row: int) -> bytes:
        """A small JPEG of an image of the folder."""
        path = self._index().paths[_row(row, self._index())]
        with open_image(path, pixels=self.images.pixels) as image:
            fitting = [one for one in (8, 4, 2) if min(image.size) >= one * THUMBNAIL]
            picture = as_picture(image.decode(next(iter(fitting), 1)))
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=80)
        return file.getvalue()

    def names(self, rows: Sequence[int]) -> list[str]:
        """Names of images of the folder."""
        index = self._index()
        return [index.name(_row(row, index)) for row in rows]

    def listing(self, rows: Sequence[int]) -> str:
        """A list of images of the folder as CSV, which `--data` takes."""
        index, text = self._index(), io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["path"])
        lines.writerows([index.paths[_row(row, index)]] for row in rows)
        return text.getvalue()

    def training(self) -> dict[str, Any]:
        """The state of the run; see `LiveRun.state`."""
        if self.run is None:
            raise UserError("no run is watched: start dino explore with --run RUN")
        with self._watching:
            return self.run.state()


TABLES = {"similarity": COLORS["inferno"], "attention": COLORS["viridis"]}


def _row(value: Any, index: Index) -> int:
    if type(value) is int and 0 <= value < len(index):
        return value
    raise UserError("the folder has no such image")


# ------------------------------------------------------------------------------------- HTTP
def application(explorer: Explorer, prefix: str, page: tuple[str, str]) -> Any:
    """The Starlette application.

    Args:
        explorer: which answers.
        prefix: the path below which everything lies, such as "/SECRET".
        page: the HTML of the page and its policy.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Mount, Route

    async def json_body(request: Request) -> dict[str, Any]:
        value = json.loads(await _body(request, 32 * 2**20))
        if not isinstance(value, dict):
            raise UserError("a JSON object is expected")
        return value

    def answer(value: Any) -> Response:
        if isinstance(value, bytes):
            return Response(value, media_type="application/octet-stream")
        return Response(value) if isinstance(value, str) else JSONResponse(value)

    async def home(request: Request) -> Response:
        html, policy = page
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    async def upload(request: Request) -> Response:
        data = await _body(request, MOST_BYTES + 1)
        name = request.query_params.get("name", "")
        key, shown = await run_in_threadpool(explorer.images.upload, name, data)
        return JSONResponse({"key": key, "name": shown})

    async def patches(request: Request) -> Response:
        body = await json_body(request)
        keys = [key for key in _list(body, "images", MOST_OPEN + 1) if isinstance(key, str)]
        patch = explorer.backbone.patch_size or 32
        size = _number(body, "size", patch, max(explorer.size, PATCHES * patch))
        block = _number(body, "block", 0, 1000)
        network = str(body.get("network"))
        return answer(await run_in_threadpool(explorer.patches, keys, network, size, block))

    async def neighbours(request: Request) -> Response:
        body = await json_body(request)
        count = _number(body, "count", 1, 200)
        return answer(await run_in_threadpool(explorer.neighbours, str(body.get("image")), count))

    async def thumbnail(request: Request) -> Response:
        data = await run_in_threadpool(explorer.thumbnail, request.path_params["row"])
        kept = {"Cache-Control": "private, max-age=3600"}  # the next index has another address
        return Response(data, media_type="image/jpeg", headers=kept)

    async def sentence(request: Request, error: Exception) -> Response:
        text = str(error) if isinstance(error, (UserError, OSError)) else "this is no valid request"
        return JSONResponse({"error": text}, status_code=400)

    async def broken(request: Request, error: Exception) -> Response:
        text = f"the server could not do this ({type(error).__name__}); its terminal says more"
        return JSONResponse({"error": text}, status_code=500)

    def route(path: str, function: Callable[..., Awaitable[Response]], method: str) -> Route:
        return Route(path, function, methods=[method])

    def computed(function: Callable[[], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return answer(await run_in_threadpool(function))

        return endpoint

    def of_rows(function: Callable[[list[int]], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            rows = _list(await json_body(request), "rows", MOST_ROWS)
            return answer(await run_in_threadpool(function, rows))

        return endpoint

    routes = [
        route("/", home, "GET"),
        route("/map", computed(explorer.places), "GET"),
        route("/run", computed(explorer.training), "GET"),
        route("/thumbnails/{row:int}", thumbnail, "GET"),
        route("/upload", upload, "POST"),
        route("/patches", patches, "POST"),
        route("/neighbours", neighbours, "POST"),
        route("/names", of_rows(explorer.names), "POST"),
        route("/list", of_rows(explorer.listing), "POST"),
    ]
    handlers: dict[Any, Any] = {
        **dict.fromkeys((UserError, OSError, ValueError, RecursionError), sentence),
        Exception: broken,
    }
    app = Starlette(routes=[Mount(prefix, routes=routes)], exception_handlers=handlers)
    return OwnPageOnly(app, f"{prefix}/")


class OwnPageOnly:
    """Refuses requests for another host, or from another page than the server's own.

    The host of a request is that of another page whose name leads to this machine (DNS rebinding).
    """

    def __init__(self, app: Any, home: str) -> None:
        self.app, self.home = app, home

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request as ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        if self._refused(scope):
            refused = [(b"content-type", b"text/plain"), (b"content-length", b"9")]
            await send({"type": "http.response.start", "status": 403, "headers": refused})
            await send({"type": "http.response.body", "body": b"forbidden"})
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"]] + [
                    (name.lower().encode(), value.encode())
                    for name, value in HEADERS.items()
                    if name.lower().encode() not in present
                ]
            await send(message)

        await self.app(scope, receive, with_headers)

    def _refused(self, scope: Any) -> bool:
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers[name.decode("latin-1")] = value.decode("latin-1")
        port = scope["server"][1]
        host = headers.get("host", "")
        if host not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            return True
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return True
        opening = scope["method"] == "GET" and scope["path"] == self.home
        site = headers.get("sec-fetch-site", "same-origin")
        return not opening and site not in ("same-origin", "none")


async def _body(request: Any, most: int) -> bytes:
    """The body of a request, of at most so many bytes."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise UserError(f"this is larger than {most >> 20} MB: choose a smaller file")
    return bytes(data)


def _number(body: dict[str, Any], name: str, low: int, high: int) -> int:
    value = body.get(name)
    if type(value) is int and low <= value <= high:
        return value
    raise UserError(f"{name} must be an integer from {low:,} to {high:,}")


def _list(body: dict[str, Any], name: str, most: int) -> list[Any]:
    value = body.get(name)
    if isinstance(value, list) and len(value) <= most:
        return value
    raise UserError(f"{name} must be a list of at most {most:,}")


# ------------------------------------------------------------------------------------- serving
@dataclass(frozen=True)
class Served:
    """A served page; Jupyter shows it as the value of a cell.

    Attributes:
        address: of the page.
        thread: that serves it.
    """

    address: str
    thread: threading.Thread
    _server: Any
    _others: Callable[[], Sequence[threading.Thread]]

    def __repr__(self) -> str:
        return f"<dino page: {self.address}>"

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{escape(self.address)}" width="100%" height="900" '
            'title="dino explore"></iframe>'
        )

    def wait(self) -> None:
        """Serve until Ctrl-C."""
        try:
            while self.thread.is_alive():
                self.thread.join(timeout=0.5)
        except KeyboardInterrupt:
            self.stop()
            # At once: Python aborts if a thread (answers, the map) is inside of C++ at its end.
            sys.stdout.flush()
            os._exit(INTERRUPTED)

    def stop(self) -> None:
        """End the server; its page stays as it is, but can ask for nothing more."""
        self._server.should_exit = True
        for thread in (self.thread, *self._others()):
            thread.join(timeout=5)


def serve(explorer: Explorer, page: Callable[[dict[str, Any]], Any], port: int = 0) -> Served:
    """Serve a page on 127.0.0.1, in a thread of its own.

    Args:
        explorer: which answers it.
        page: makes its HTML and its policy of what `Explorer.about` returns.
        port: 0 for any that is free.

    Raises:
        UserError: if the packages are not installed, or the port is not free.
    """
    with needs_extra("explore", "a served page"):
        import starlette  # noqa: F401
        import uvicorn
    prefix = f"/{secrets.token_urlsafe(12)}"
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError:
        listening.close()
        raise UserError(f"--port {port} is in use: choose another, or 0 for any") from None
    app = application(explorer, prefix, page(explorer.about()))
    config = uvicorn.Config(
        app, log_level="error", lifespan="off", http="h11", ws="none", server_header=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listening]}, name="dino explore", daemon=True
    )
    thread.start()
    for _ in range(1000):
        if server.started or not thread.is_alive():
            break
        time.sleep(0.01)
    if not server.started:
        raise UserError("the server could not start: its message stands above")
    first = threading.Thread(target=explorer.warm_up, daemon=True)
    first.start()

    def others() -> Sequence[threading.Thread]:
        return [first, *([explorer.placing] if explorer.placing else [])]

    address = f"http://127.0.0.1:{listening.getsockname()[1]}{prefix}/"
    return Served(address, thread, server, others)
