"""Pictures as PNG files."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dino.files import replacing


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, atomically."""
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")
