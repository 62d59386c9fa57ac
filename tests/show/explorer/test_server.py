"""The server of `dino explore`: what it answers, and what nobody gets from it."""

from __future__ import annotations

import base64
import csv
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dino
from dino.data.sources.open import open_source
from dino.features.extractor import extract
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.show.explorer.page import explore
from dino.show.explorer.server import Served
from dino.weights.load import save

pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")


class Site(NamedTuple):
    """A served page, and what is behind it."""

    served: Served
    network: Backbone
    folder: Path
    run: Path

    def ask(
        self, route: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Status and answer; JSON is read."""
        address = urlsplit(self.served.address)
        connection = http.client.HTTPConnection(address.netloc, timeout=60)
        sent = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        path = route if route.startswith("/") else address.path + route
        connection.request(method or ("GET" if body is None else "POST"), path, sent, names)
        answer = connection.getresponse()
        data, kind = answer.read(), answer.headers.get("content-type", "")
        connection.close()
        return answer.status, json.loads(data) if "json" in kind else data

    def uploaded(self, image: Image.Image, name: str = "a.png") -> str:
        status, answer = self.ask(f"upload?name={quote(name)}", encoded(image))
        assert status == 200, answer
        return str(answer["key"])

    def patches(self, *keys: str, **changes: Any) -> Any:
        wanted = {"images": keys, "network": "weights", "size": 32, "block": 0, **changes}
        return self.ask("patches", wanted)


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def noise(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def small_network(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    options = {"embed_dim": 24, "depth": 3, "heads": 2, "patch_size": 8, "image_size": 32}
    return dino.create("vit_tiny", **options).eval()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    for name in ("photos/a", "photos/b", "run"):
        (root / name).mkdir(parents=True)
    for number in range(12):
        noise(number).save(root / "photos" / "ab"[number % 2] / f"{number:02}.png")
    (root / "secret.png").write_bytes(encoded(noise(99)))
    (root / "run" / "config.json").write_text('{"total_steps": 40}')
    network = small_network()
    served = explore(
        network,
        noise(50),
        size=32,
        folder=root / "photos",
        index=root / "index",
        run=root / "run",
    )
    assert isinstance(served, Served)
    yield Site(served, network, root / "photos", root / "run")
    served.stop()
    assert not served.thread.is_alive()


# ---------------------------------------------------------------------------------- what it answers
def test_patches_are_those_of_the_network(site: Site) -> None:
    _, one = site.patches("given-0", site.uploaded(noise(1)), block=2)
    assert [image["name"] for image in one["images"]] == ["image 1", "a.png"]
    assert (one["block"], one["depth"], one["heads"]) == (2, 3, 2)
    picture = one["images"][1]["picture"].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (40, 32)
    for block in (1, 2, 3):
        shorter = site.network.first_blocks(block)
        images = torch.randn(1, 3, 32, 40)
        every = site.network.features(images, last=3, attention=block - 1)
        found = shorter.features(images, attention=True)
        assert torch.equal(found.patches[0], every.patches[block - 1])
        assert torch.equal(found.attention, every.attention)  # type: ignore[arg-type]
    assert site.network.depth == 3
    assert len(site.network.blocks) == 3  # type: ignore[arg-type]
    _, other = site.patches("given-0", block=3)
    assert other["images"][0]["data"] != one["images"][0]["data"]


def test_neighbours_are_those_of_the_features(site: Site) -> None:
    table = extract(site.network, open_source(site.folder))
    features = F.normalize(table.features.double(), dim=1)
    key = site.uploaded(noise(7))
    for image, row, skipped in ((key, 7, False), ("row-3", None, True)):
        query = (
            features[3]
            if row is None
            else features[table.paths.index(str(site.folder / "b/07.png"))]
        )
        expected = (features @ query).sort(descending=True)
        status, found = site.ask("neighbours", {"image": image, "count": 4})
        rows = expected.indices[int(skipped) :][:4].tolist()
        assert status == 200
        assert [one["row"] for one in found] == rows
        assert [one["name"] for one in found] == [
            os.path.relpath(table.paths[index], site.folder) for index in rows
        ]
        cosines = [one["cosine"] for one in found]
        assert cosines == pytest.approx(expected.values[int(skipped) :][:4].tolist(), abs=1e-5)


def test_the_map_and_the_list_are_of_the_folder(site: Site) -> None:
    for _ in range(600):
        status, answer = site.ask("map")
        assert status == 200
        if isinstance(answer, bytes):
            break
        threading.Event().wait(timeout=0.1)
    places = np.frombuffer(answer, "<u2").reshape(12, 2)
    assert places.min(axis=0).tolist() == [0, 0]
    assert places.max(axis=0).tolist() == [65535, 65535]
    rows = [0, 11, 5]
    _, names = site.ask("names", {"rows": rows})
    _, text = site.ask("list", {"rows": rows})
    lines = list(csv.reader(io.StringIO(text.decode())))
    assert lines[0] == ["path"]
    assert [os.path.relpath(path, site.folder) for (path,) in lines[1:]] == names
    (site.run / "list.csv").write_bytes(text)
    source = open_source(site.run / "list.csv")
    assert [source.path(i) for i in range(len(source))] == [path for (path,) in lines[1:]]


def test_thumbnails_are_small_pictures_of_their_row(site: Site) -> None:
    status, data = site.ask("thumbnails/1")
    assert status == 200
    with Image.open(site.folder / "a/02.png") as original, Image.open(io.BytesIO(data)) as small:
        assert max(small.size) <= 128
        pair = [np.asarray(picture.convert("L"), float) for picture in (original, small)]
        assert np.abs(pair[0] - pair[1]).mean() < 15  # of another image it is above 40


def test_a_run_is_followed_while_it_trains(site: Site) -> None:
    def log(text: str, mode: str = "a") -> Any:
        with (site.run / "metrics.jsonl").open(mode) as file:
            file.write(text)
        status, state = site.ask("run")
        assert status == 200
        return state

    assert log("")["charts"] == []
    state = log(
        '{"step": 2, "loss": 5.0}\n{"step": 3, "knn": {"k10": 40.5, "k20": 41.5}}\n{"step": 4'
    )
    assert (state["step"], state["total"], state["teacher"]) == (3, 40, None)
    assert {one["title"]: one["value"] for one in state["charts"]} == {
        "Loss": "5",
        "k-NN accuracy, %": "41.5",
    }
    state = log(', "loss": 4.0}\nno json\n')
    assert state["step"] == 4
    assert "5 at first, 4 at step 4" in next(
        one["svg"] for one in state["charts"] if one["title"] == "Loss"
    )
    assert log('{"step": 1, "loss": 7}\n', "w")["step"] == 1  # resumed from an earlier checkpoint
    status, answer = site.patches("given-0", network="run")
    assert status == 400
    assert "no teacher yet" in answer["error"]
    for seed in (1, 2):
        teacher = small_network(seed)
        save(teacher, site.run / "teacher.safetensors", {"step": seed})
        assert site.ask("run")[1]["teacher"] is not None
        expected = explore(teacher, noise(50), size=32)
        _, found = site.patches("given-0", network="run")
        data = json.loads(expected.html.split('id="content">')[1].split("</script>")[0])  # type: ignore[union-attr]
        assert found["images"][0]["data"] == data["images"][0]["data"]


# ------------------------------------------------------------------------------------ bad uploads
UPLOADS = {
    "no image": (b"GIF88 not really", "begins as GIF, but its header is damaged"),
    "no bytes": (b"", "holds no bytes"),
    "too many pixels": (encoded(Image.new("1", (20_000, 20_000))), "400,000,000, more than"),
    "more pixels than fit": (encoded(Image.new("1", (8_000, 8_000))), "8,000 x 8,000 pixels"),
    "a torn file": (encoded(noise(1))[:300], "cannot be read"),
    "html": (b"<html><script>alert(1)</script>", "a web page"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_a_bad_upload_is_a_sentence(case: str, site: Site) -> None:
    content, words = UPLOADS[case]
    status, answer = site.ask("upload?name=x.png", content)
    assert status == 400
    assert words in answer["error"]
    assert "x.png" in answer["error"]
    assert site.patches("given-0")[0] == 200  # the server is alive


def test_a_large_body_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino.show.explorer.opened.MOST_BYTES", 1000)
    monkeypatch.setattr("dino.show.explorer.server.MOST_BYTES", 1000)
    status, answer = site.ask("upload?name=x.png", bytes(1001))
    assert (status, "more than" in answer["error"]) == (400, True)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\a.png", "a.png"),
        ("<img src=x onerror=alert(1)>.png", "<img src=x onerror=alert(1)>.png"),
        ("a\r\nb\x00.png", "ab.png"),
        ("", "image"),
        ("/" * 5, "image"),
        ("x" * 5000 + ".png", "x" * 96 + ".png"),
    ],
)
def test_names_of_uploads_are_plain(name: str, shown: str, site: Site) -> None:
    status, answer = site.ask(f"upload?name={quote(name)}", encoded(noise(3)))
    assert (status, answer["name"]) == (200, shown)
    assert site.patches(answer["key"])[1]["images"][0]["name"] == shown


def test_old_uploads_make_room(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first = site.uploaded(noise(1))
    monkeypatch.setattr("dino.show.explorer.opened.KEPT_PIXELS", 2 * 40 * 32)
    site.uploaded(noise(2))
    assert site.patches(first)[0] == 200  # also: it is the newest again
    second = site.uploaded(noise(3))
    third = site.uploaded(noise(4))
    assert [site.patches(key)[0] for key in (first, second, third)] == [400, 200, 200]


# ------------------------------------------------------------------------------------ strangers
def test_nothing_outside_of_the_folder_can_be_read(site: Site) -> None:
    secret = site.folder.parent / "secret.png"
    for route in (
        f"/{secret}",
        str(secret),
        "../secret.png",
        "thumbnails/../../secret.png",
        "thumbnails/%2e%2e%2fsecret.png",
        "thumbnails/..%2f..%2fsecret.png",
        "static/page.js",
        "/",
        "/etc/passwd",
    ):
        assert site.ask(route)[0] in (403, 404), route
    for route in ("thumbnails/12", "thumbnails/99999999999999999999999"):
        assert site.ask(route)[0] == 400
    for key in (
        str(secret),
        f"row-{secret}",
        "row-12",
        "row--1",
        "row-1e1",
        "given-1",
        "",
        "row-\u0663",
    ):
        status, answer = site.patches(key)
        assert (status, "not open" in answer["error"]) == (400, True), key
        assert site.ask("neighbours", {"image": key, "count": 1})[0] == 400
    for row in (12, -1, "1", 1.0, True, None, str(secret)):
        for route in ("names", "list"):
            assert site.ask(route, {"rows": [row]})[0] == 400, row


def test_only_its_own_page_drives_it(site: Site) -> None:
    host = urlsplit(site.served.address).netloc
    port = host.partition(":")[2]
    for headers in (
        {"Host": "example.com"},
        {"Host": f"example.com:{port}"},
        {"Host": f"127.0.0.1.example.com:{port}"},
        {"Origin": "http://example.com"},
        {"Origin": "null"},
        {"Origin": f"https://{host}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ):
        for route, body in (("run", None), ("thumbnails/1", None), ("names", {"rows": [0]})):
            assert site.ask(route, body, **headers)[0] == 403, headers
    assert site.ask("", Host="example.com")[0] == 403
    assert site.ask("", Sec_Fetch_Site="cross-site")[0] == 200  # a link, as in a notebook
    assert site.ask("run", Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200
    assert site.ask("/guessed/run")[0] == 404
    assert site.ask("upload?name=a", encoded(noise(1)), method="PUT")[0] == 405


def test_a_user_cannot_see_the_uploads_of_another(site: Site) -> None:
    mine, other = site.uploaded(noise(1), "mine.png"), site.uploaded(noise(2), "other.png")
    assert site.patches(mine)[1]["images"][0]["name"] == "mine.png"
    assert len({mine, other}) == 2
    assert min(map(len, (mine, other))) > 24
    for answer in (site.ask("run")[1], site.ask("")[1], site.patches("given-0")[1]):
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        assert mine.encode() not in text
        assert other.encode() not in text


def test_requests_without_sense_are_sentences(site: Site) -> None:
    wanted: dict[str, Any] = {"images": ["given-0"], "network": "weights", "size": 32, "block": 0}
    for change in (
        {"size": 10**9},
        {"size": 0},
        {"size": "32"},
        {"size": True},
        {"block": -1},
        {"network": "../run"},
        {"images": "given-0"},
        {"images": ["given-0"] * 13},
        {"images": ["given-0"] * 1000},
    ):
        status, answer = site.ask("patches", {**wanted, **change})
        assert (status, isinstance(answer["error"], str)) == (400, True), change
    for body in (b"", b"[1]", b"{", b"[" * 100_000):
        assert site.ask("patches", body)[0] == 400
    assert site.patches()[1]["images"] == []
    assert site.patches("given-0")[0] == 200


def test_the_page_may_ask_its_server_only(site: Site) -> None:
    address = urlsplit(site.served.address)
    connection = http.client.HTTPConnection(address.netloc, timeout=60)
    connection.request("GET", address.path)
    answer = connection.getresponse()
    policy = answer.headers["content-security-policy"]
    connection.close()
    assert "default-src 'none'; img-src data: 'self'; style-src 'sha256-" in policy
    assert policy.endswith("connect-src 'self'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert site.served._repr_html_().startswith(f'<iframe src="{site.served.address}"')


# ------------------------------------------------------------------------------------ starting
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_the_command_serves_until_ctrl_c(site: Site, tmp_path: Path) -> None:
    save(site.network, tmp_path / "w.safetensors")
    words = ["explore", "w.safetensors", str(site.folder / "a"), "--size", "32", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dino", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert b"given-5" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.stdout.close()
        process.wait(timeout=60)


def test_mistakes_are_sentences(tmp_path: Path, site: Site) -> None:
    network = small_network()
    for words, options in {
        "no config.json": {"run": tmp_path},
        "add --images": {"index": tmp_path / "index"},
        "neither a folder nor a run": {"folder": site.folder, "out": tmp_path / "a.html"},
        "port is 70000": {"port": 70_000},
        "is in use": {"port": urlsplit(site.served.address).port},
        "up to 12": {"images": [noise(1)] * 13, "served": True},
    }.items():
        with pytest.raises(UserError, match=words):
            explore(network, **{"images": None, **options})  # type: ignore[arg-type]
