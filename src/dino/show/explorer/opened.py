"""The images that a served page may show: given ones, those of the folder, and uploads.

An upload belongs to whoever holds its key, which nobody can guess and no answer lists.
"""

from __future__ import annotations

import io
import re
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from PIL import Image

from dino.data.images.decode import Sample, open_image, read_image
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import PixelFormat
from dino.features.index import Index
from dino.files import UserError

MOST_BYTES = 64 * 2**20
"""Of an uploaded file."""

MOST_PIXELS = 50_000_000
"""Of an uploaded image: three bytes each while it is open."""

KEPT_PIXELS = 200_000_000
"""Of all uploads; the oldest ones are forgotten."""


class OpenedImages:
    """Images by key: "given-N", "row-N" of an index, or the secret of an upload."""

    def __init__(
        self, given: Sequence[tuple[str, Sample]], index: Index | None, pixels: PixelFormat
    ) -> None:
        self.given, self.index, self.pixels = given, index, pixels
        self._uploads: OrderedDict[str, tuple[str, Sample]] = OrderedDict()
        self._lock = Lock()

    def upload(self, name: str, content: bytes) -> tuple[str, str]:
        """Keep an uploaded file; returns its key and its name, without folders.

        Raises:
            UserError: if it is no image, or too large.
        """
        name = clean_name(name)
        if not content:
            raise ImageError(name, "it holds no bytes", "empty")
        if len(content) > MOST_BYTES:
            raise ImageError(name, f"it has more than {MOST_BYTES >> 20} MB", "too large")
        with open_image(io.BytesIO(content), name, self.pixels) as image:
            height, width = image.size
            if height * width > MOST_PIXELS:
                reason = f"its {width:,} x {height:,} pixels are more than {MOST_PIXELS:,}"
                raise ImageError(name, reason, "too large")
            sample = image.decode()
        key = f"upload-{secrets.token_urlsafe(16)}"
        with self._lock:
            self._uploads[key] = (name, sample)
            while sum(_pixels(one) for _, one in self._uploads.values()) > KEPT_PIXELS:
                self._uploads.popitem(last=False)
        return key, name

    def image(self, key: str) -> tuple[str, Sample]:
        """Name and pixels of an image.

        Raises:
            UserError: if there is none with this key, or its file cannot be read any more.
        """
        with self._lock:
            if key in self._uploads:
                self._uploads.move_to_end(key)
                return self._uploads[key]
        kind, _, number = key.partition("-")
        if number.isascii() and number.isdecimal() and len(number) < 12:
            if kind == "given" and int(number) < len(self.given):
                return self.given[int(number)]
            if kind == "row" and self.index is not None and int(number) < len(self.index):
                path = self.index.paths[int(number)]
                return self.index.name(int(number)), read_image(path, pixels=self.pixels)
        raise UserError("this image is not open any more: add it again")


def _pixels(sample: Sample) -> int:
    width, height = sample.size if isinstance(sample, Image.Image) else sample.shape[1:]
    return width * height


def clean_name(name: str) -> str:
    """The last part of a name that a browser sent, printable and short."""
    last = re.split(r"[/\\]", name)[-1]
    printable = "".join(letter for letter in last if letter.isprintable()).strip()
    return printable[-100:] or "image"
