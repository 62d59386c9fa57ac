"""Where the members of a tar archive lie: ustar, GNU and PAX headers, without reading the members.

Python's `tarfile` ends without a word at a damaged header or a missing end, and takes four times as
long; the tests hold this against it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

BLOCK = 512
_LONGEST = 2**20  # of an extended header, in bytes: nothing sane needs more
_TAIL = 2**20  # bytes behind the end mark that are looked at

# Types of the header's byte 156.
_REGULAR, _LINKS, _SPARSE = (b"0", b"\0", b"7"), (b"1", b"2"), b"S"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")

Kind = Literal["file", "link", "sparse", "other"]


class Member(NamedTuple):
    """A member: its name, the offset and number of its bytes, and what it is."""

    name: str
    offset: int
    size: int
    kind: Kind


class TarDamage(Exception):
    """What is wrong with an archive, in a few words, from which byte on."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset, self.reason = offset, reason


def members(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
    """All members in order, up to the archive's end mark.

    Args:
        read: gives the bytes at (offset, count), all that are asked for.
        size: of the archive in bytes.

    Yields:
        Each member, also a last one that the archive's end cuts off.

    Raises:
        TarDamage: after the last member that can be told, if the archive does not end as it should.
    """
    position = 0
    names: dict[str, str] = {}  # what extended headers tell of the next member,
    everywhere: dict[str, str] = {}  # and of all that follow
    while True:
        if position + BLOCK > size:
            raise TarDamage(position, "it ends without an end mark")
        header = read(position, BLOCK)
        if header[0] == 0 and not any(header):
            if any(read(position, min(size - position, _TAIL))):
                raise TarDamage(position, "more follows its end mark, as in joined archives")
            return
        if not _sound(header):
            raise TarDamage(position, "it has a damaged header")
        kind, length = header[156:157], _number(header[124:136])
        start = position + BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            if length > _LONGEST or start + length > size:
                raise TarDamage(position, "it ends inside a header")
            found = _extended(kind, read, start, length)
            (everywhere if kind == _PAX_GLOBAL else names).update(found)
            position = _after(start, length)
            continue
        told = {**everywhere, **names}
        names = {}
        sparse = kind == _SPARSE or any(key.startswith("GNU.sparse") for key in told)
        extended = kind == _SPARSE and header[482] != 0
        while extended and start + BLOCK <= size:
            extended = read(start, BLOCK)[504] != 0
            start += BLOCK
        length = 0 if kind in _WITHOUT_BYTES else int(told.get("size", length))
        name = told.get("path") or _name(header)
        what: Kind = "link" if kind in _LINKS else "sparse" if sparse else "other"
        if what == "other" and kind in _REGULAR and not name.endswith("/"):
            what = "file"
        yield Member(name, start, length, what)
        if start + length > size:
            raise TarDamage(start, f"it ends inside {name}")
        position = _after(start, length)


def _after(start: int, length: int) -> int:
    return start + (length + BLOCK - 1) // BLOCK * BLOCK


def _sound(header: bytes) -> bool:
    """Whether the header's checksum holds (its own field counts as spaces)."""
    try:
        told = _number(header[148:156])
        _number(header[124:136])
    except ValueError:
        return False
    counted = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if told == counted:
        return True
    return told == counted - 256 * sum(byte > 127 for byte in header)  # as some old programs sum


def _number(field: bytes) -> int:
    """Octal digits, or binary after a first byte with its highest bit set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU's own format has something else in the prefix's place
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _text(name)


def _extended(
    kind: bytes, read: Callable[[int, int], bytes], start: int, length: int
) -> dict[str, str]:
    """What a header that describes the next member says: PAX records, or a long name of GNU's."""
    content = read(start, length)
    if kind == _LONG_LINK:
        return {}
    if kind == _LONG_NAME:
        return {"path": _text(content.split(b"\0", 1)[0])}
    records: dict[str, str] = {}
    while content:  # such as b"30 path=...\n", where 30 is the length of all of it
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits) <= len(content):
            raise TarDamage(start, "it has a damaged header")
        key, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        content = content[int(digits) :]
    return records


def _text(name: bytes) -> str:
    return os.fsdecode(name)
