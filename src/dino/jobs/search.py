"""`dino search`: the images of a folder that are most similar to others.

The folder is indexed once (`dino.features.index`); the index is kept up to date, image by image.

Shapes: q queries, n images, D width.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from dino.data.images.decode import read_image
from dino.data.sources.open import open_source
from dino.data.sources.packed_strings import PackedStrings
from dino.features.command import TRAINED, OptionalImages, number_table
from dino.features.contact_sheet import ImagesByPath, neighbour_rows, save_sheet
from dino.features.index import Index
from dino.features.search import nearest
from dino.files import UserError, atomic_csv, finite_json
from dino.jobs.command import IndexedJobSettings, Job, job
from dino.models.backbone import Backbone
from dino.progress import Console
from dino.runtime import ranks
from dino.settings import Range, validated

MOST_BYTES = 2**26
"""Of an image that is sent to the server."""

MOST_RESULTS = 1000
"""Of a request."""

WAIT_SECONDS = 30.0
"""That the server waits for the rest of a request."""

Neighbours = list[list[tuple[str, float]]]
"""Of each query the paths of the most similar images, best first, and their similarities."""


@dataclass(frozen=True, kw_only=True)
class Search(IndexedJobSettings):
    """Index a folder of images once, and look up others in it."""

    queries: OptionalImages = None
    """Images to look up. Without them, and without --serve, the folder is only indexed."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("found")
    """Folder of the results."""
    k: Annotated[int, Range(low=1, high=10**6)] = 10
    """How many images of each query."""
    serve: Annotated[int, Range(low=0, high=65535)] | None = None
    """Answer requests on this port of this machine only, until Ctrl-C; 0 takes a free one."""


def run(settings: Search) -> dict[str, Any]:
    """`dino search`: results.csv, search.json and a sheet; or a server.

    Returns:
        The JSON's "search": counts, and for images with classes "precision" by network, in percent.

    Raises:
        UserError: for weights, images or an index that cannot be used, or a port in use.
    """
    settings = validated(settings)
    if settings.queries is None and (settings.baseline or settings.compare):
        raise UserError("--baseline and --compare need --queries, whose results are compared")
    if ranks().world > 1:
        raise UserError("dino search runs as one process: leave torchrun out")
    with job("search", settings, settings.data, settings.queries) as started:
        index = settings.opened_index(started.network)
        content: dict[str, Any] = {"images": len(index), "index": str(index.folder)}
        line = f"{len(index):,} images are indexed in {index.folder}"
        if settings.queries is None:
            Console().print(line, soft_wrap=True)
        else:
            content |= _look_up(settings, started, index, settings.queries, line)
        if settings.serve is not None:
            with server(index, started.network, settings.serve) as serving:
                address = f"http://127.0.0.1:{serving.server_port}/"
                Console().print(f"{address} answers until Ctrl-C", soft_wrap=True)
                serving.serve_forever()
    return content


# ------------------------------------------------------------------------------------- queries
def _look_up(settings: Search, started: Job, index: Index, name: str, line: str) -> dict[str, Any]:
    """Look up all queries, write the results and print them."""
    source, queries = (open_source(one, started.pixels) for one in (settings.data, name))
    searched, asked = ImagesByPath(source), ImagesByPath(queries)
    found: dict[str, Neighbours] = {}
    for network_name, network in started.networks.items():
        tested = settings.table(network, queries, f"{network_name}, queries")
        features, paths = tested.finite(), index.paths
        if network_name == TRAINED:
            similarity, rows = index.nearest(features, settings.k, device=started.device)
            query_paths = tested.paths
        else:
            bank = settings.table(network, source, network_name)
            k, paths = min(settings.k, len(bank)), PackedStrings(bank.paths)
            similarity, rows = nearest(features, bank.finite(), k, device=started.device)
        found[network_name] = [
            [(paths[row], value) for row, value in zip(*one, strict=True)]
            for one in zip(rows.tolist(), similarity.tolist(), strict=True)
        ]
    own = found[TRAINED]
    content: dict[str, Any] = {"queries": len(own), "k": len(own[0])}
    tables = []
    if source.labels is not None and queries.labels is not None:
        classes = [asked.class_name(path) for path in query_paths]
        content["precision"] = {
            network_name: precision(classes, of, searched) for network_name, of in found.items()
        }
        shown = {n: [f"{value:.1f}"] for n, value in content["precision"].items()}
        title = f"results with the query's class, in %, {content['k']} a query"
        tables.append(number_table(title, ["features", "precision"], shown))
    listing, sheet = started.out / "results.csv", started.out / "sheet.png"
    lines = (
        (query, rank, path, f"{value:.6f}")
        for query, of in zip(query_paths, own, strict=True)
        for rank, (path, value) in enumerate(of, start=1)
    )
    atomic_csv(listing, ("query", "rank", "path", "similarity"), lines)
    save_sheet(sheet, *neighbour_rows(source, queries, query_paths, own))
    results = [
        {"query": query, "results": _as_json(of)}
        for query, of in zip(query_paths, own, strict=True)
    ]
    everything = {"images": len(index), "index": str(index.folder), **content}
    started.report(
        {"search": everything, "results": results}, *tables, line, files=[listing, sheet]
    )
    return content


def precision(classes: Sequence[str], found: Neighbours, searched: ImagesByPath) -> float:
    """The share of results with the class of their query, in percent."""
    right = [
        searched.class_name(path) == name
        for name, of in zip(classes, found, strict=True)
        for path, _ in of
    ]
    return 100 * sum(right) / len(right)


def _as_json(found: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"path": path, "similarity": round(value, 6)} for path, value in found]


# ------------------------------------------------------------------------------------- server
class _Refused(Exception):
    """A request that cannot be answered: its status, and the reason in a sentence."""


def server(index: Index, backbone: Backbone, port: int) -> ThreadingHTTPServer:
    """A server of this machine, which answers in JSON; see docs/jobs.md.

    Other machines cannot connect, and pages of other sites, which a browser on this machine shows,
    cannot ask it under another name.

    Raises:
        UserError: if the port is in use.
    """
    rows = {path: row for row, path in enumerate(index.paths)}
    pixels, turn = backbone.preprocessing.pixels, threading.Lock()
    device = next(backbone.parameters()).device

    def feature_of(content: bytes) -> Float[Tensor, "1 D"]:
        try:
            with turn, torch.inference_mode():
                sample = read_image(io.BytesIO(content), "the image", pixels)
                images = backbone.preprocessing(sample)[None]
                return backbone(images.to(device)).float().cpu()
        except UserError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from None

    class Handler(BaseHTTPRequestHandler):
        timeout = WAIT_SECONDS

        def do_GET(self) -> None:
            """`/` tells what is served; `/search?image=PATH` looks up an image of the index."""
            self._answer(None)

        def do_POST(self) -> None:
            """`/search` looks up the image that is sent."""
            self._answer(self.headers.get("Content-Length", ""))

        def _answer(self, length: str | None) -> None:
            status, content = HTTPStatus.OK, dict[str, Any]()
            try:
                content = self._content(length)
            except _Refused as refused:
                status, content = refused.args[0], {"error": refused.args[1]}
            body = json.dumps(finite_json(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _content(self, length: str | None) -> dict[str, Any]:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if host not in ("127.0.0.1", "localhost"):
                raise _Refused(HTTPStatus.FORBIDDEN, "ask for 127.0.0.1 or localhost")
            url = urlsplit(self.path)
            if url.path == "/" and length is None:
                return {"images": len(index), "weights": index.about["weights"]}
            if url.path != "/search":
                raise _Refused(HTTPStatus.NOT_FOUND, "there are only / and /search")
            words = parse_qs(url.query)
            k = words.get("k", ["10"])[0]
            if not (k.isdecimal() and 1 <= int(k) <= MOST_RESULTS):
                raise _Refused(HTTPStatus.BAD_REQUEST, f"k goes from 1 to {MOST_RESULTS}")
            if length is None:
                return self._neighbours_of(words.get("image", [""])[0], int(k))
            if not (length.isdecimal() and 0 < int(length) <= MOST_BYTES):
                raise _Refused(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"send an image of at most {MOST_BYTES:,} bytes, with its Content-Length",
                )
            return _neighbours(feature_of(self.rfile.read(int(length))), int(k))

        def _neighbours_of(self, path: str, k: int) -> dict[str, Any]:
            if path not in rows:
                raise _Refused(HTTPStatus.NOT_FOUND, f"the index has no image {path!r}")
            row = rows[path]
            return _neighbours(index.features[row : row + 1], k, skip=row)

        def log_message(self, *arguments: Any) -> None:
            """Nothing: requests are not logged."""

    def _neighbours(feature: Float[Tensor, "1 D"], k: int, **options: Any) -> dict[str, Any]:
        similarity, found = index.nearest(feature, k, device=device, **options)
        paths = [index.paths[row] for row in found[0].tolist()]
        return {"results": _as_json([*zip(paths, similarity[0].tolist(), strict=True)])}

    try:
        serving = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(
            f"port {port} cannot be used ({error.strerror}): choose another with --serve, or 0 for "
            "a free one"
        ) from None
    serving.daemon_threads = True
    return serving
