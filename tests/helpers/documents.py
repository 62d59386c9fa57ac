"""What the documentation says: its blocks of code, the code within sentences, its links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FILES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))),
)

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s#]+)")


class Code(NamedTuple):
    """Code, and where it stands: `README.md:27`."""

    file: str
    line: int
    text: str
    language: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without comments, each in one line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def blocks(file: str) -> list[Code]:
    """The blocks of code of a file; each begins in the line behind its fence."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = [*_BLOCK.finditer(text)]
    assert text.count("```") == 2 * len(found), f"{file} has a fence that is not understood"
    return [Code(file, _line(text, one.start(2)), one[2], one[1]) for one in found]


def inline(file: str) -> list[Code]:
    """The code within sentences, each in one line."""
    text = _without_blocks(file)
    return [
        Code(file, _line(text, found.start()), " ".join(found[1].split()))
        for found in _INLINE.finditer(text)
    ]


def links(file: str) -> Iterator[str]:
    """The files that a file links to, as it names them."""
    found = _LINK.findall(_without_blocks(file))
    yield from (target for target in found if "://" not in target)


def _without_blocks(file: str) -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    return _BLOCK.sub(lambda found: "\n" * found[0].count("\n"), text)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
