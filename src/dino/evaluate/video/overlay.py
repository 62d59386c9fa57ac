"""An animation of a video with the masks of its objects.

Shapes: H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dino.data.images.decode import read_picture
from dino.data.images.masks import Mask, read_mask
from dino.evaluate.video.davis import Clip
from dino.evaluate.video.davis_metrics import boundary
from dino.files import replacing

STRENGTH = 0.5
"""Opacity of an object's colour, from 0 to 1; its boundary is opaque."""

LONGEST = 480
"""Longer side of an animation in pixels, at most."""

MILLISECONDS = 80
"""Duration of each frame."""


def write_overlay(clip: Clip, masks: Path, path: Path) -> None:
    """Write an animated GIF of a video and its masks, with one frame in memory at a time.

    Each mask in the folder `masks` has the name of its frame.
    """
    first, *others = clip.frames
    pictures = (_picture(frame, masks) for frame in others)
    with replacing(path) as temporary:
        _picture(first, masks).save(
            temporary, "GIF", save_all=True, append_images=pictures, duration=MILLISECONDS, loop=0
        )


def _picture(frame: Path, masks: Path) -> Image.Image:
    picture = overlaid(read_picture(frame), read_mask(masks / f"{frame.stem}.png"))
    picture.thumbnail((LONGEST, LONGEST))
    return picture.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def overlaid(picture: Image.Image, mask: Mask) -> Image.Image:
    """A picture with its objects in the colours of the mask's palette."""
    pixels = np.array(picture.convert("RGB"), dtype=np.float32)
    for number in mask.objects:
        region, color = mask.ids == number, np.array(color_of(mask, number), dtype=np.float32)
        pixels[region] += STRENGTH * (color - pixels[region])
        pixels[boundary(region)] = color
    return Image.fromarray(pixels.round().astype(np.uint8))


def color_of(mask: Mask, number: int) -> tuple[int, int, int]:
    """An object's colour in the palette, or that of the palette of VOC and DAVIS."""
    if mask.palette is not None and len(mask.palette) >= 3 * number + 3:
        red, green, blue = mask.palette[3 * number : 3 * number + 3]
        return red, green, blue
    # The three lowest bits of the number are the highest of red, green and blue, and so on.
    bit = [number >> place & 1 for place in range(9)]
    red, green, blue = (128 * bit[i] + 64 * bit[i + 3] + 32 * bit[i + 6] for i in range(3))
    return red, green, blue
