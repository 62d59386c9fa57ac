"""The members of a tar archive: where they lie, and what is wrong with an archive."""

from __future__ import annotations

import io
import tarfile
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino.data.sources.shard_index import DamagedArchive, _kind, members


class Member(NamedTuple):
    name: str
    offset: int
    size: int
    kind: str


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

letters = st.text("abc.é_", min_size=1, max_size=12)
short = st.lists(letters, min_size=1, max_size=3).map("/".join)
long = st.tuples(st.integers(90, 300), letters).map(lambda pair: "d/" * (pair[0] // 2) + pair[1])
contents = st.lists(
    st.tuples(short | long, st.binary(max_size=40) | st.just(b"\xff" * 600)), max_size=8
)


def packed(files: list[tuple[str, bytes]], kind: str) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=FORMATS[kind]) as archive:
        for name, content in files:
            about = tarfile.TarInfo(name)
            about.size, about.mtime = len(content), 1.5 if kind == "pax" else 1
            archive.addfile(about, io.BytesIO(content))
    return target.getvalue()


def walked(archive: bytes) -> tuple[list[Member], DamagedArchive | None]:
    found = []
    try:
        for item in members(io.BytesIO(archive), len(archive)):
            found.append(Member(item.name, item.offset_data, item.size, _kind(item)))
    except DamagedArchive as error:
        return found, error
    return found, None


def by_tarfile(archive: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return [(item.name, item.offset_data, item.size) for item in opened if item.isreg()]


@given(contents, st.sampled_from(["gnu", "pax"]))
def test_members_are_those_of_tarfile(files: list[tuple[str, bytes]], kind: str) -> None:
    archive = packed(files, kind)
    found, damage = walked(archive)
    assert damage is None
    assert [member[:3] for member in found if member.kind == "file"] == by_tarfile(archive)
    for member, (_, content) in zip(found, files, strict=True):
        assert archive[member.offset : member.offset + member.size] == content


def test_long_names_of_ustar() -> None:
    archive = packed([("d" * 120 + "/" + "n" * 90 + ".jpg", b"x"), ("a.jpg", b"y")], "ustar")
    assert [member[:3] for member in walked(archive)[0]] == by_tarfile(archive)


@given(contents.filter(bool), st.sampled_from(["gnu", "pax"]), st.data())
def test_a_cut_loses_nothing_without_a_word(
    files: list[tuple[str, bytes]], kind: str, data: st.DataObject
) -> None:
    archive = packed(files, kind)
    complete, _ = walked(archive)
    mark = max(member.offset + member.size for member in complete)
    cut = data.draw(st.integers(0, mark + 512 - 1))  # before the end mark is complete
    found, damage = walked(archive[:cut])
    assert damage is not None
    assert found == complete[: len(found)]
    entire = [member for member in found if member.offset + member.size <= cut]
    assert (
        entire
        == [member for member in complete if member.offset + member.size <= cut][: len(entire)]
    )
    assert len(found) - len(entire) <= 1
    assert (len(found) > len(entire)) == (
        "ends inside" in damage.reason and "a header" not in damage.reason
    )


@given(st.integers(0, 511), st.integers(1, 255))
def test_a_damaged_header_is_noticed(place: int, change: int) -> None:
    archive = bytearray(packed([("a.jpg", b"x"), ("b.jpg", b"y")], "gnu"))
    archive[1024 + place] ^= change
    found, damage = walked(bytes(archive))
    if damage is None:  # a changed checksum that means the same number: "\0" and " " both end it
        assert 148 <= place < 156
        assert len(found) == 2
    else:
        assert (damage.offset, damage.reason) == (1024, "it has a damaged header")
        assert [member.name for member in found] == ["a.jpg"]


def test_joined_archives_are_noticed() -> None:
    one = packed([("a.jpg", b"x")], "gnu")
    found, damage = walked(one + packed([("b.jpg", b"y")], "gnu"))
    assert [member.name for member in found] == ["a.jpg"]
    assert damage is not None
    assert "more follows its end mark" in damage.reason


def test_links_folders_and_sparse_files_are_distinguished() -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, kind in [
            ("d", tarfile.DIRTYPE),
            ("l", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("p", tarfile.FIFOTYPE),
        ]:
            about = tarfile.TarInfo(name)
            about.type, about.linkname, about.size = (
                kind,
                "t" * 150,
                700,
            )  # without content behind them
            archive.addfile(about)
        sparse = tarfile.TarInfo("s")
        sparse.size, sparse.pax_headers = 3, {"GNU.sparse.major": "1"}
        archive.addfile(sparse, io.BytesIO(b"abc"))
        archive.addfile(tarfile.TarInfo("f"))
    found, damage = walked(target.getvalue())
    assert damage is None
    assert [(m.name.rstrip("/"), m.kind) for m in found] == [
        *(("d", ""), ("l", "link"), ("h", "link"), ("p", "")),
        *(("s", "sparse"), ("f", "file")),
    ]


def test_sizes_above_eight_gibibytes_are_binary() -> None:
    about = tarfile.TarInfo("big.jpg")
    about.size = 2**33 + 5
    header = about.tobuf(format=tarfile.GNU_FORMAT)
    found = members(io.BytesIO(header), 2**34)
    big = next(found)
    assert (big.name, big.offset_data, big.size) == ("big.jpg", 512, 2**33 + 5)


def test_old_headers_without_a_magic_and_signed_sums() -> None:
    archive = bytearray(packed([("é.jpg", b"x")], "gnu"))
    archive[257:265] = bytes(8)
    for summed in (sum, lambda block: sum(byte - 256 * (byte > 127) for byte in block)):
        archive[148:156] = b" " * 8
        archive[148:156] = b"%06o\0 " % summed(archive[:512])
        found, damage = walked(bytes(archive))
        assert damage is None
        assert found == [Member("é.jpg", 512, 1, "file")]


@pytest.mark.parametrize("archive", [b"", b"no tar", b"x" * 2048])
def test_what_is_no_archive(archive: bytes) -> None:
    found, damage = walked(archive)
    assert found == []
    assert damage is not None
    assert damage.offset == 0
