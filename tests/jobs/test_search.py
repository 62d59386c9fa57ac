"""Search: the nearest features of an index, by command and by HTTP."""

from __future__ import annotations

import csv
import http.client
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fakes import MeanColor
from PIL import Image

from dino.cli import main
from dino.features.index import Index, open_index
from dino.files import UserError
from dino.jobs import search
from dino.jobs.search import Search, run, server


def png(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), color).save(file, "png")
    return file.getvalue()


def test_the_command_finds_what_the_features_say(
    weights: str,
    color_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos, asked = color_folder("photos", 4), color_folder("asked", 2)
    out, index = tmp_path / "out", tmp_path / "index"
    words = ["--workers", "0", "--index", str(index)]
    main(["search", weights, str(photos), *words])
    assert "12 images are indexed" in capsys.readouterr().out
    words += ["--queries", str(asked), "--k", "3", "--out", str(out), "--baseline"]
    main(["search", weights, str(photos), *words])
    content = json.loads((out / "search.json").read_text())
    assert content["search"]["precision"]["pixels"] == 100  # the same colour is nearest
    assert content["search"]["precision"].keys() == {"trained", "untrained", "pixels"}
    with (out / "results.csv").open() as file:
        lines = [*csv.DictReader(file)]
    assert len(lines) == 6 * 3
    for one in content["results"]:
        similar = [found["similarity"] for found in one["results"]]
        assert similar == sorted(similar, reverse=True)
        same = Path(one["query"]).parent.name + "/" + Path(one["query"]).name
        assert one["results"][0]["path"].endswith(same)  # the equal image is first
        assert similar[0] == pytest.approx(1, abs=1e-5)
    assert (out / "sheet.png").exists()
    with pytest.raises(UserError, match="need --queries"):
        run(Search(weights=weights, data=str(photos), baseline=True))


@pytest.fixture
def index(color_folder: Callable[..., Path], tmp_path: Path) -> Index:
    return open_index(MeanColor().eval(), color_folder("photos", 3), tmp_path / "index")


@pytest.fixture
def port(index: Index) -> Iterator[int]:
    serving = server(index, MeanColor().eval(), 0)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield serving.server_port
    serving.shutdown()
    serving.server_close()
    thread.join(10)


def ask(port: int, method: str, url: str, **options: Any) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, url, **options)
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def test_the_server_answers_with_the_nearest_images(port: int, index: Index) -> None:
    assert ask(port, "GET", "/")[1]["images"] == 9
    status, found = ask(port, "POST", "/search?k=2", body=png((10, 30, 220)))
    assert status == 200
    assert [Path(one["path"]).parent.name for one in found["results"]] == ["blue", "blue"]
    assert found["results"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    path = index.paths[0]
    _, others = ask(port, "GET", f"/search?k=9&image={path}")
    assert len(others["results"]) == 8
    assert path not in [one["path"] for one in others["results"]]
    features = index.features.numpy()
    expected = np.sort(features[1:] @ features[0])[::-1]
    assert [one["similarity"] for one in others["results"]] == pytest.approx(expected, abs=1e-5)


def test_the_server_refuses_in_a_sentence(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MOST_BYTES", 1000)
    for method, url, options, status in (
        ("GET", "/search?image=/etc/passwd", {}, 404),
        ("GET", "/other", {}, 404),
        ("GET", "/search?image=x&k=0", {}, 400),
        ("POST", "/search", {"body": b"no image"}, 400),
        ("POST", "/search", {"body": bytes(1001)}, 413),
        ("GET", "/", {"headers": {"Host": "evil.example"}}, 403),
    ):
        got, content = ask(port, method, url, **options)
        assert got == status, url
        assert len(content["error"]) > 10


def test_a_port_in_use_is_named(port: int, index: Index) -> None:
    with pytest.raises(UserError, match=f"port {port} cannot be used .*--serve"):
        server(index, MeanColor().eval(), port)
