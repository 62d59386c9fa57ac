"""Pictures of maps and masks, such as where the CLS token looks (Figures 1, 3, 4).

The maps are those of `dino.models.attention`. Shapes: h w patches, H W pixels.
"""

from __future__ import annotations

from jaxtyping import Float
from PIL import Image
from torch import Tensor


def colored(values: Float[Tensor, "h w"], size: tuple[int, int], colors: str) -> Image.Image:
    """A map as a picture: darkest where smallest, brightest where largest, sharp patches.

    Args:
        values: any finite numbers.
        size: (width, height) of the picture in pixels.
        colors: a colour map of matplotlib: the paper has viridis, its videos inferno.
    """
    import matplotlib

    numbers = values.double().cpu()
    low, high = numbers.min(), numbers.max()
    shares = (numbers - low) / (high - low).clamp(min=1e-12)
    rgb = matplotlib.colormaps[colors](shares.numpy(), bytes=True)[..., :3]
    return Image.fromarray(rgb.copy()).resize(size, Image.Resampling.NEAREST)


def overlay(
    image: Image.Image,
    values: Float[Tensor, "h w"],
    *,
    colors: str = "inferno",
    strength: float = 0.6,
) -> Image.Image:
    """A picture with a map laid over it.

    Args:
        image: the pixels that the map covers (whole patches only, see `whole_patches`).
        values: the map.
        colors: a colour map of matplotlib.
        strength: of the map, from 0 (picture only) to 1 (map only).
    """
    base = image.convert("RGB")
    return Image.blend(base, colored(values, base.size, colors), strength)


def whole_patches(image: Image.Image, patch: int) -> Image.Image:
    """The part of a picture that patches cover: rows and columns that fill none are cut off."""
    return image.crop((0, 0, image.width // patch * patch, image.height // patch * patch))
