"""Files are replaced atomically, and errors of the disk become sentences."""

from __future__ import annotations

import csv
import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from dino.files import (
    UserError,
    atomic_csv,
    atomic_json,
    atomic_write,
    cache_folder,
    check_output,
    check_outside,
    csv_text,
    disk_errors,
    naming,
    read_json,
    replacing,
)

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def raising(number: int) -> Any:
    def function(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return function


def test_an_error_half_way_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    atomic_write(tmp_path / "deep" / "ours", b"x")
    assert (tmp_path / "deep" / "ours").stat().st_mode == plain.stat().st_mode


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "private"
    atomic_write(path, "a")
    path.chmod(0o600)
    atomic_write(path, "b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    for name in ("a" * 255, "ü" * 127):
        atomic_write(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOTSUP])
def test_network_shares_may_refuse_chmod_and_fsync(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raising(number))
    monkeypatch.setattr(Path, "chmod", raising(number))
    atomic_write(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    link.symlink_to(target)
    for content in ("first", "second"):  # the first makes folder and target
        check_output(link)
        atomic_write(link, content)
        assert link.is_symlink()
        assert target.read_text() == content


def test_devices_and_pipes_are_written_to(tmp_path: Path) -> None:
    # A terminal of the test's own: broken code run by root would replace /dev/null for everybody.
    reader, terminal = os.openpty()
    atomic_write(os.ttyname(terminal), "content")
    assert os.read(reader, 100) == b"content"
    assert stat.S_ISCHR(os.stat(os.ttyname(terminal)).st_mode)  # noqa: PTH116
    for descriptor in (reader, terminal):
        os.close(descriptor)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    advice = r"pipe cannot be used .*: let another program read it"
    with pytest.raises(UserError, match=advice), disk_errors():  # nobody reads: it does not wait
        atomic_write(pipe, "x")
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)) as file:
        atomic_write(pipe, "content")
        assert file.read() == "content"
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_the_output_of_the_program_is_written_to_in_order(tmp_path: Path) -> None:
    code = (
        "from dino.files import atomic_write as w; print('a'); w('/dev/stdout', 'b\\n'); print('c')"
    )
    with (tmp_path / "out").open("w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True, timeout=60)
    assert (tmp_path / "out").read_text() == "a\nb\nc\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("res.txt", {"endings": (".json",)}, "res.txt has another ending than .json"),
        ("res", {"endings": (".npy", ".parquet")}, "res has another ending than .npy, .parquet"),
        ("folder", {}, "folder is a folder: name a file"),
        ("file.json", {"folder": True}, "file.json is a file: name a folder"),
        ("file.json/a/b.json", {}, "file.json, which is a file"),
        ("file.json/a", {"folder": True}, "file.json, which is a file"),
        ("new.npy", {"siblings": (".csv",)}, "new.csv is a folder: name a file"),
        (os.devnull, {"endings": (".json",)}, "null has another ending than .json"),
        (os.devnull, {"folder": True}, "null is a file: name a folder"),
        (None, {"option": "out"}, "out must be a path, not None"),
        ("loop", {}, "symbolic links"),
    ],
)
def test_outputs_are_checked(
    name: Any, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir(), (tmp_path / "new.csv").mkdir()
    (tmp_path / "file.json").write_text("old")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        check_output(name and tmp_path / name, **options)
    assert sentence in str(caught.value)
    check_output(tmp_path / "file.json", (".json",))
    check_output(tmp_path / "deep" / "er" / "new.JSON", (".json",), siblings=(".csv",))
    check_output(tmp_path / "deep" / "er", folder=True)
    check_output(os.devnull)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_place_that_cannot_be_written_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", raising(number))
    with pytest.raises(UserError) as caught:
        check_output(tmp_path / "new" / "a.json", option="--json")
    assert f"--json {tmp_path / 'new' / 'a.json'} cannot be used" in str(caught.value)
    assert os.strerror(number) in str(caught.value)


@pytest.mark.skipif(ROOT, reason="root may write everything")
def test_write_protected_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch(0o400)
    with pytest.raises(UserError, match="write-protected"):
        check_output(path)


def test_errors_of_the_disk_become_sentences(tmp_path: Path) -> None:
    def sentence(error: Exception) -> str:
        with pytest.raises(UserError) as caught, disk_errors(), naming(tmp_path / "a"):
            raise error
        return str(caught.value)

    full = f"{tmp_path / 'a'} cannot be used (No space left on device): free space, or choose"
    assert full in sentence(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    rust = 'I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
    assert full in sentence(SafetensorError(rust))
    assert full in sentence(OSError("[Errno 28] Error writing bytes to file"))  # Arrow
    cause = RuntimeError("a wrapper")
    cause.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert full in sentence(cause)
    assert sentence(FileNotFoundError(2, "no", "b")) == "b does not exist: check the name"
    assert "(32 requested and 3 written)" in sentence(OSError("32 requested and 3 written"))
    for other in (RuntimeError("error code: 28"), SafetensorError("damaged"), UserError("mine")):
        with pytest.raises(type(other)) as caught, disk_errors(), naming("a"):
            raise other
        assert caught.value is other


def test_json_has_no_nan(tmp_path: Path) -> None:
    atomic_json(tmp_path / "a.json", {"a": [1.0, float("nan")], "b": (float("inf"), "x")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.0, None], "b": [None, "x"]}
    assert read_json(tmp_path / "a.json")["b"] == [None, "x"]


def test_csv_keeps_every_name(tmp_path: Path) -> None:
    names = ['say "a, b"', "two\nlines", os.fsdecode(b"\xff.jpg")]  # the last is not UTF-8
    atomic_csv(tmp_path / "a.csv", ("path", "rank"), [(name, 1) for name in names])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows == [["path", "rank"], *([name, "1"] for name in names)]


def test_csv_has_no_formula_and_gives_every_text_back(tmp_path: Path) -> None:
    texts = [
        "=1+1",
        "+x",
        "-x",
        "@sum",
        "\tx",
        "\rx",
        "'=x",
        "''@",
        "'plain",
        "a=b",
        "-1.5e3",
        "+7",
        "",
    ]
    atomic_csv(tmp_path / "a.csv", ("=head", "value"), [(text, -2.5) for text in texts])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["'=head", "value"]
    assert [row[0] for row in rows[:5]] == ["'=1+1", "'+x", "'-x", "'@sum", "'\tx"]
    assert [row[0] for row in rows[8:]] == ["'plain", "a=b", "-1.5e3", "+7", ""]
    assert {row[1] for row in rows} == {"-2.5"}
    assert [csv_text(row[0]) for row in rows] == texts


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="is not a JSON file"):
        read_json(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"DINO_CACHE": "/x/y", "XDG_CACHE_HOME": "/c"}, "/x/y"),
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/dino"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "/home/me/.cache/dino"),
        ("linux", {}, "/home/me/.cache/dino"),
        ("darwin", {"XDG_CACHE_HOME": "/c"}, "/home/me/Library/Caches/dino"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/dino"),
        ("win32", {}, "/home/me/AppData/Local/dino"),
    ],
)
def test_cache_folders(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DINO_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == Path(expected)


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DINO_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cache_folder().is_absolute()
    assert not cache_folder().parent.exists()


def test_outputs_do_not_lie_among_images(tmp_path: Path) -> None:
    images = tmp_path / "photos"
    images.mkdir()
    (tmp_path / "link").symlink_to(images)
    for place in (images / "run", images / "a" / "b.png", images, tmp_path / "link" / "run"):
        with pytest.raises(UserError, match="lies in the folder of images"):
            check_outside(place, images)
    for place in (tmp_path / "run", tmp_path / "photos2", images / ".." / "run", None):
        check_outside(place, images)
    check_outside("photos/run", "hf:photos")
    check_outside(images / "run", [images])
