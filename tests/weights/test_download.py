"""Downloads from a server of this machine: complete, resumed, checked, or refused by a sentence."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.server import Files, serving

import dino
from dino.files import UserError
from dino.weights import download as fetching
from dino.weights.download import cached_path, fetch, source_url
from dino.weights.key_maps import from_dino
from dino.weights.load import read_checkpoint
from dino.weights.published import CATALOGUE, Published

TINY: dict[str, Any] = {"embed_dim": 192, "depth": 1, "heads": 3, "patch_size": 8, "image_size": 16}


def checkpoint(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    torch.manual_seed(seed)
    torch.save(dino.create("vit_tiny", **TINY).state_dict(), buffer)
    return buffer.getvalue()


DATA = checkpoint()
HASH = hashlib.sha256(DATA).hexdigest()
PUBLISHED = Published("test_vit", "folder/vit.pth", "backbone", {"arch": "vit_tiny"}, 1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "PAUSE", 0.0)
    with serving() as (address, files):
        monkeypatch.setenv("DINO_MIRROR", address + "/mirror/")
        files.content["/mirror/folder/vit.pth"] = DATA
        yield files


def refusal(published: Published) -> str:
    with pytest.raises(UserError) as caught:
        fetch(published)
    assert "\n" not in str(caught.value)
    assert not cached_path(published).exists()
    return str(caught.value)


def beside(published: Published) -> set[str]:
    folder = cached_path(published).parent
    return {path.name.removeprefix("vit.pth") for path in folder.iterdir()}


def test_a_download(server: Files, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fetch(PUBLISHED)
    assert path == cache / "weights" / "folder" / "vit.pth"
    assert path.read_bytes() == DATA
    record = json.loads(path.with_name("vit.pth.json").read_text())
    assert record["sha256"] == HASH
    assert record["url"] == source_url(PUBLISHED)
    printed = capsys.readouterr().err
    assert HASH in printed
    assert "no hash is published" in printed
    assert beside(PUBLISHED) == {"", ".json", ".lock"}
    assert fetch(PUBLISHED) == path
    assert capsys.readouterr().err == ""  # printed once
    assert len(server.requests) == 1


def test_a_file_that_changed_since_is_noticed(server: Files) -> None:
    path = fetch(PUBLISHED)
    path.write_bytes(DATA[:-1] + b"?")
    with pytest.raises(UserError, match="is not what was first downloaded"):
        fetch(PUBLISHED)
    path.unlink()
    assert fetch(PUBLISHED).read_bytes() == DATA


def test_a_cut_connection_is_resumed(server: Files) -> None:
    server.cut = [1500, 2500]
    assert fetch(PUBLISHED).read_bytes() == DATA
    assert [span for _, span in server.requests] == [None, "bytes=1500-", "bytes=4000-"]
    assert beside(PUBLISHED) == {"", ".json", ".lock"}


def test_an_unknown_length(server: Files) -> None:
    """A cut is then found by the CRCs inside."""
    server.stated, server.cut = "", [4000]
    assert "arrived damaged" in refusal(PUBLISHED)
    assert fetch(PUBLISHED).read_bytes() == DATA


TEXT = Published("test_args", "folder/args.txt", "args", {"arch": "vit_tiny"}, 1)


@pytest.mark.parametrize("length", ["", "many", "-1", "1e3"])
def test_a_text_of_unknown_length_is_not_taken_as_complete(length: str, server: Files) -> None:
    """Nothing in it would show that it was cut."""
    server.content["/mirror/folder/args.txt"] = b"arch: vit_tiny"
    server.stated = length
    assert "may have been cut, since no length came with it" in refusal(TEXT)
    server.stated = None
    assert fetch(TEXT).read_bytes() == b"arch: vit_tiny"


@pytest.mark.parametrize("published", [PUBLISHED, TEXT])
def test_an_empty_answer_is_no_file(published: Published, server: Files) -> None:
    server.content[f"/mirror/{published.file}"] = b""
    for server.stated in (None, ""):
        assert "arrived damaged" in refusal(published)


@pytest.mark.parametrize("ending", ["part", "part.json", "json", "lock"])
def test_a_link_in_a_shared_cache_is_not_followed(
    ending: str, server: Files, tmp_path: Path
) -> None:
    target, path = tmp_path / "of another user", cached_path(PUBLISHED)
    target.write_bytes(b"precious")
    path.parent.mkdir(parents=True)
    path.with_name(f"vit.pth.{ending}").symlink_to(target)
    assert f"vit.pth.{ending} is a link or no file" in refusal(PUBLISHED)
    assert target.read_bytes() == b"precious"
    path.with_name(f"vit.pth.{ending}").unlink()
    assert fetch(PUBLISHED).read_bytes() == DATA


@pytest.mark.parametrize(
    "mirror",
    [
        "http://[",
        "http://",
        "http://host:port",
        "http://h:99999",
        "http://a b",
        f"http://{'x' * 99}",
        "ftp://host",
        "host",
        "http://h\u00f6st",
        "http://host\n",
    ],
)
def test_a_mirror_that_is_no_address(mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_MIRROR", mirror)
    assert "DINO_MIRROR must be an address that begins with http" in refusal(PUBLISHED)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_a_record_that_is_none_is_named(content: str, server: Files) -> None:
    path = fetch(PUBLISHED)
    path.with_name("vit.pth.json").write_text(content)
    with pytest.raises(UserError, match=r"vit\.pth\.json is damaged: delete it"):
        fetch(PUBLISHED)


def test_without_ranges_it_begins_again(server: Files) -> None:
    server.cut, server.ranges = [1500], False
    assert fetch(PUBLISHED).read_bytes() == DATA


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_without_a_mark_of_the_version_it_begins_again(tag: str | None, server: Files) -> None:
    server.cut, server.tag = [1500], tag
    assert fetch(PUBLISHED).read_bytes() == DATA
    assert [span for _, span in server.requests] == [None, None]


def test_another_version_is_not_appended(server: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "TRIES", 1)
    server.cut = [1500, 0]
    assert "the next try continues" in refusal(PUBLISHED)
    assert beside(PUBLISHED) == {".part", ".part.json", ".lock"}
    other = b"x" * 1500 + DATA[1500:]
    server.content["/mirror/folder/vit.pth"], server.tag = other, '"two"'
    assert "arrived damaged" in refusal(PUBLISHED)  # the complete other version
    assert server.requests[-1] == ("/mirror/folder/vit.pth", "bytes=1500-")
    server.content["/mirror/folder/vit.pth"], server.tag = DATA, '"three"'
    assert fetch(PUBLISHED).read_bytes() == DATA


def test_a_partial_file_of_another_place_is_not_continued(
    server: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "TRIES", 1)
    server.cut = [1500, 0]
    refusal(PUBLISHED)
    monkeypatch.setenv("DINO_MIRROR", source_url(PUBLISHED).removesuffix("/mirror/folder/vit.pth"))
    server.content["/folder/vit.pth"] = DATA
    assert fetch(PUBLISHED).read_bytes() == DATA
    assert server.requests[-1] == ("/folder/vit.pth", None)


def test_a_shrunken_file(server: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses the range: what is there begins anew."""
    monkeypatch.setattr(fetching, "TRIES", 1)
    server.cut = [len(DATA) - 10, 0]
    refusal(PUBLISHED)
    monkeypatch.setattr(fetching, "TRIES", 3)
    server.content["/mirror/folder/vit.pth"] = DATA[: len(DATA) // 2]
    assert "arrived damaged" in refusal(PUBLISHED)
    assert [span for _, span in server.requests[-2:]] == [f"bytes={len(DATA) - 10}-", None]


def test_a_corrupted_body_is_refused(server: Files) -> None:
    middle = len(DATA) // 2
    flipped = bytes([DATA[middle] ^ 255])
    server.content["/mirror/folder/vit.pth"] = DATA[:middle] + flipped + DATA[middle + 1 :]
    assert "arrived damaged" in refusal(PUBLISHED)
    assert beside(PUBLISHED) == {".lock"}
    server.content["/mirror/folder/vit.pth"] = b"<html>please log in</html>"
    assert "arrived damaged" in refusal(PUBLISHED)


def test_answers_of_the_server(server: Files) -> None:
    server.answers = [503, 500]
    assert fetch(PUBLISHED).read_bytes() == DATA
    cached_path(PUBLISHED).unlink()
    server.answers = [404]
    text = refusal(PUBLISHED)
    assert "404" in text
    assert str(cached_path(PUBLISHED)) in text
    server.answers = [503] * 20
    assert "503" in refusal(PUBLISHED)
    assert len(server.answers) == 20 - fetching.TRIES


def test_no_server(server: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (address, _):
        pass
    monkeypatch.setenv("DINO_MIRROR", address)
    text = refusal(PUBLISHED)
    assert "cannot be downloaded" in text
    assert "DINO_MIRROR" in text
    monkeypatch.setenv("DINO_MIRROR", "file:///etc")
    assert "must be an address that begins with http" in refusal(PUBLISHED)


def test_offline(server: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("1", "on", "TRUE", "yes"):
        monkeypatch.setenv("DINO_OFFLINE", word)
        assert "DINO_OFFLINE is set" in refusal(PUBLISHED)
    assert server.requests == []
    cached_path(PUBLISHED).write_bytes(DATA)  # brought by hand, as the sentence says
    assert fetch(PUBLISHED).read_bytes() == DATA


def test_a_cache_that_cannot_be_written(cache: Path, server: Files) -> None:
    (cache / "weights").write_text("a file in the way")
    with pytest.raises(UserError, match="DINO_CACHE to another folder"):
        fetch(PUBLISHED)


def test_one_download_for_all_requests_at_once(server: Files) -> None:
    """Each opens the lock file anew, so threads stand for processes here."""
    server.pause = 0.2
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(fetch, [PUBLISHED] * 3))
    assert set(paths) == {cached_path(PUBLISHED)}
    assert paths[0].read_bytes() == DATA
    assert len(server.requests) == 1


@pytest.mark.parametrize("arrives", [False, True])
def test_the_wait_for_another_process_has_a_limit(
    arrives: bool, server: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends when nothing has arrived for some time, not while the other process downloads."""
    path, clock, other = cached_path(PUBLISHED), [0.0], ExitStack()
    path.parent.mkdir(parents=True)

    def sleep(seconds: float) -> None:
        clock[0] += fetching.LOCK_TIMEOUT / 4
        if arrives:
            path.with_name("vit.pth.part").write_bytes(bytes(int(clock[0])))
        if clock[0] > 5 * fetching.LOCK_TIMEOUT:
            other.close()

    other.enter_context(fetching._locked(path))
    monkeypatch.setattr(fetching, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    with other:
        if arrives:
            assert fetch(PUBLISHED).read_bytes() == DATA
        else:
            assert "another process holds" in refusal(PUBLISHED)
            assert server.requests == []


def test_a_published_name_is_fetched_and_loaded(server: Files) -> None:
    published = CATALOGUE["dino_vits16"]
    server.content[f"/mirror/{published.file}"] = DATA
    backbone = dino.load("dino_vits16")
    assert backbone.spec["embed_dim"] == 192
    assert backbone.origin is not None
    assert backbone.origin["file_sha256"] == HASH
    with pytest.raises(UserError, match="did you mean dino_vits16"):
        dino.load("dino_vits17")


def test_a_shared_cache_need_not_be_writable(
    server: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(PUBLISHED)
    path.with_name("vit.pth.lock").unlink()
    monkeypatch.setattr("os.access", lambda *_: False)
    assert fetch(PUBLISHED) == path
    assert beside(PUBLISHED) == {"", ".json"}
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="is not what was first downloaded"):
        fetch(PUBLISHED)


# ------------------------------------------------------------------------------------ DINOv3
def test_terms_are_shown_before_a_download(
    server: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also from a mirror; without one the sentence says where access is given."""
    published = replace(PUBLISHED, collection="dinov3", sha256=HASH[:8])
    server.content["/mirror/folder/vit.pth"] = DATA
    path = fetch(published)
    printed = capsys.readouterr().err
    assert "test_vit is published under Meta's own DINOv3 License" in printed
    assert "no hash is published" not in printed
    path.unlink()
    monkeypatch.delenv("DINO_MIRROR")
    refused = refusal(published)
    assert "accept the DINOv3 License at https://ai.meta.com/" in refused
    assert f"download vit.pth and put it at {path}" in refused
    assert "DINOv3 License" in capsys.readouterr().err
    path.write_bytes(DATA)  # by hand
    assert fetch(published) == path
    path.with_name("vit.pth.json").unlink()
    path.write_bytes(DATA[:-1] + b"?")
    with pytest.raises(UserError, match=rf"is not the published file .* not {HASH[:8]}"):
        fetch(published)


def test_satellite_weights_bring_their_transform(
    server: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "dinov3_vitl16_sat"
    published = replace(CATALOGUE[name], sha256="")
    monkeypatch.setitem(CATALOGUE, name, published)
    network = dino.create(
        "vit_tiny", **{**TINY, "position": "rope", "registers": 4, "heads": 3, "key_bias": False}
    )
    buffer = io.BytesIO()
    official = from_dino(network.state_dict(), "official", network.spec)
    torch.save(official, buffer)
    server.content[f"/mirror/{published.file}"] = buffer.getvalue()
    found = dino.load(name)
    assert found.preprocessing == published.preprocessing
    assert found.preprocessing.mean == (0.430, 0.411, 0.296)
    assert read_checkpoint(name).preprocessing == published.preprocessing
    assert found.heads == 3
