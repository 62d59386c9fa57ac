"""Colour jitter, grey, blur, solarise and normalise, for a batch of uint8 crops at once.

Each image has one row of parameters (`dino.data.views.view_spec.PHOTOMETRIC`), and there is no loop
over images. The operations are those of torchvision and Pillow on PIL images, computed in floating
point from 0 to 255 without rounding to integers in between.

Every operation has a parameter that changes nothing (factor 1, sigma 0, ...). A GPU runs each one
on the entire batch, with these where an image is not to be changed, so that the host never waits; a
CPU runs it on the other images alone, or uses the compiled kernels of `photometric_cpu` if numba is
installed. Functions that end in an underscore overwrite their pixels.

Shapes: N images, C channels, H height and W width or S side, P parameters.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from dino.data.views.view_spec import JITTER_OPERATIONS, NEVER_SOLARIZE, PHOTOMETRIC
from dino.runtime import full_precision

_, _CONTRAST, _SATURATION, _HUE = range(4)  # as `JITTER_OPERATIONS`
_LAST = len(JITTER_OPERATIONS) - 1
_FACTORS = slice(PHOTOMETRIC.index("brightness"), PHOTOMETRIC.index("hue") + 1)
_ORDER = slice(PHOTOMETRIC.index("first"), PHOTOMETRIC.index("fourth") + 1)
_JITTER, _SHIFT, _GREY, _SIGMA, _SOLARIZE = (
    PHOTOMETRIC.index(name) for name in ("jitter", "hue", "grey", "sigma", "solarize")
)

LUMA = (0.299, 0.587, 0.114)
"""Grey as Pillow's "L" weighs red, green and blue (ITU-R 601-2)."""


@torch.no_grad()
def augment(
    images: UInt8[Tensor, "N C H W"],
    params: Float[Tensor, "N P"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "N C H W"]:
    """Apply each image's photometric parameters and normalise it.

    The order is the reference's: the jitter's four operations in the row's order, grey, blur,
    solarise, normalise.

    Args:
        images: square crops, any device. Saturation, hue and grey mean something for RGB only: with
            other channels, `params` must switch them off (`ViewSpec.for_channels`). Their
            contrast is that to the mean of all channels.
        params: one row of `PHOTOMETRIC` for each image, on the same device.
        mean: of each channel, for pixels in 0..1.
        std: of each channel, for pixels in 0..1.
        dtype: of the result; everything is computed in float32.

    Raises:
        ValueError: if the images are not squares with the channels of `mean` and `std`.
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"expected uint8 images [N, C, S, S], not {tuple(images.shape)}")
    if not images.shape[1] == len(mean) == len(std):
        raise ValueError(
            f"{images.shape[1]} channels need as many means and deviations, "
            f"not {len(mean)} and {len(std)}"
        )
    if images.device.type == "cpu" and _numba_is_installed():
        from dino.data.views.photometric_cpu import augment_into  # compiles at the first import

        result = torch.empty(images.shape)
        grey = torch.tensor(LUMA if len(mean) == 3 else [1 / len(mean)] * len(mean))
        scale, shift = _normalization(tuple(mean), tuple(std), images.device)
        constants = (params.float().contiguous(), grey, scale.flatten(), shift.flatten())
        operands = (images.contiguous(), *constants, result)
        augment_into(*(operand.numpy() for operand in operands))
        return result.to(dtype)
    with full_precision(images.device):
        return normalize(photometric_(images.float(), params), mean, std).to(dtype)


@lru_cache
def _numba_is_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def photometric_(
    pixels: Float[Tensor, "N C S S"], params: Float[Tensor, "N P"]
) -> Float[Tensor, "N C S S"]:
    """`augment` without the normalisation, on any device: pixels from 0 to 255 in and out."""
    jitter_(pixels, params)
    grey, sigma, threshold = (params[:, column] for column in (_GREY, _SIGMA, _SOLARIZE))
    if pixels.shape[1] == 3:
        saturation = torch.full_like(grey, _SATURATION)
        _apply_(blend_, pixels, grey > 0, saturation, 1 - grey)
    _apply_(blur_, pixels, sigma > 0, sigma)
    _apply_(solarize_, pixels, threshold < NEVER_SOLARIZE, threshold)
    return pixels


def _apply_(
    operation: Callable[..., None],
    pixels: Float[Tensor, "N C S S"],
    changed: Bool[Tensor, " N"],
    *parameters: Float[Tensor, " N"],
) -> None:
    """Run an operation that leaves all images but the `changed` ones as they are."""
    if pixels.device.type == "cpu":  # on a GPU the host would have to wait for their number
        if not changed.any():
            return
        if not changed.all():
            subset = pixels[changed]
            operation(subset, *(parameter[changed] for parameter in parameters))
            pixels[changed] = subset
            return
    operation(pixels, *parameters)


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "*batch C H W"]:
    """Pixels from 0 to 255 (uint8 or float) to zero mean and unit variance per channel."""
    scale, shift = _normalization(tuple(mean), tuple(std), images.device)
    return torch.addcmul(shift, images.to(torch.float32), scale)


@lru_cache(maxsize=16)
def _normalization(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    # Cached, since copying even six numbers to a GPU would make the host wait for it.
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale[:, None, None], shift[:, None, None]


def _image(column: Tensor) -> Tensor:
    """One number per image, to be broadcast over its pixels."""
    return column[:, None, None, None]


# ---------------------------------------------------------------------------------- colour
def jitter_(pixels: Float[Tensor, "N C S S"], params: Float[Tensor, "N P"]) -> None:
    """The `ColorJitter` of torchvision: four operations, in another order for each image.

    Hue costs far more than the others, so it is computed once: the operations that an image has
    before its hue come first, then every hue, then the operations that come after it.
    """
    on, order = params[:, _JITTER] > 0, params[:, _ORDER]
    factors = params[:, _FACTORS].gather(1, order.long())
    hue_place = (order == _HUE).float().argmax(dim=1)
    for place in range(_LAST):
        factor = torch.where(on & (hue_place > place), factors[:, place], 1.0)
        _apply_(blend_, pixels, factor != 1, order[:, place], factor)
    if pixels.shape[1] == 3:
        turns = params[:, _SHIFT] * on
        _apply_(shift_hue_, pixels, turns != 0, turns)
    for place in range(1, _LAST + 1):
        factor = torch.where(on & (hue_place < place), factors[:, place], 1.0)
        _apply_(blend_, pixels, factor != 1, order[:, place], factor)


def blend_(
    pixels: Float[Tensor, "N C S S"], operation: Float[Tensor, " N"], factor: Float[Tensor, " N"]
) -> None:
    """Brightness, contrast or saturation: away from black, the mean grey, or each pixel's grey.

    Args:
        pixels: 0 to 255.
        operation: index into `JITTER_OPERATIONS`, not that of the hue.
        factor: 1 changes nothing, 0 leaves black, the mean grey or each pixel's grey.
    """
    anchor = luma(pixels)
    mean = anchor.mean(dim=(1, 2, 3)) * (operation == _CONTRAST)
    anchor.mul_(_image(operation == _SATURATION)).add_(_image(mean))
    torch.lerp(anchor, pixels, _image(factor), out=pixels)
    pixels.clamp_(0, 255)


def luma(pixels: Float[Tensor, "N C S S"]) -> Float[Tensor, "N 1 S S"]:
    """Grey of RGB as `LUMA` weighs it; of other channels, their mean."""
    if pixels.shape[1] != 3:
        return pixels.mean(dim=1, keepdim=True)
    red, green, blue = pixels.chunk(3, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def shift_hue_(pixels: Float[Tensor, "N 3 S S"], turns: Float[Tensor, " N"]) -> None:
    """Turn the hue of the HSV colour model, keeping saturation and value.

    With v the largest channel and c the largest minus the smallest (the chroma), the usual three
    cases for the hue h in turns, by which channel is the largest, are together
    `h = 1/3 + (green + blue - red - v) / 6c`, with the sign of `green - blue`. Back again, a
    channel of hue o (red 0, green 1/3, blue 2/3) is `v - c clamp(6d - 1, 0, 1)`, where d is the
    distance from h to o around the circle. Neither selects, which is slow on a CPU.

    Args:
        pixels: 0 to 255.
        turns: -0.5 to 0.5, for each image; truncated to 255ths, as torchvision does on PIL images.
    """
    turns = (turns * 255).trunc() / 255
    red, green, blue = pixels.chunk(3, dim=1)
    value = torch.maximum(red, green)
    torch.maximum(value, blue, out=value)
    chroma = torch.minimum(red, green)
    torch.minimum(chroma, blue, out=chroma)
    torch.sub(value, chroma, out=chroma)
    # Grey pixels have no hue, and as their chroma is 0 any hue will do.
    hue = (green + blue).sub_(red).sub_(value).div_(chroma.clamp_min(1e-6)).add_(2).mul_(1 / 6)
    hue.copysign_(green - blue).add_(_image(turns))
    hues = torch.arange(3, device=pixels.device)[:, None, None] / 3
    # The colours are now in value, chroma and hue, so their memory is free. Two turns and a half
    # more make the fraction 1/2 where d = 0, and keep what it is taken from positive.
    distance = torch.sub(hue.add_(2.5), hues, out=pixels).frac_().sub_(0.5).abs_()
    torch.addcmul(value.add_(chroma), chroma, distance.mul_(6).clamp_(1, 2), value=-1, out=pixels)


def solarize_(pixels: Float[Tensor, "N C S S"], threshold: Float[Tensor, " N"]) -> None:
    """Invert the values that would round to `threshold` or more.

    As `127.5 + (127.5 - x) * sign`, with +1 from the threshold up and -1 below it.
    """
    above = pixels - _image(threshold - 0.5)
    sign = torch.ones_like(pixels).copysign_(above)
    pixels.neg_().add_(127.5).mul_(sign).add_(127.5)


# ---------------------------------------------------------------------------------- blur
def blur_(pixels: Float[Tensor, "N C S S"], sigma: Float[Tensor, " N"]) -> None:
    """Pillow's `GaussianBlur` of radius `sigma`, as two products with a banded matrix.

    Pillow approximates a Gaussian by three passes of a box of fractional width, repeating the
    pixels at the border. With one pass as a matrix B [S, S], all passes are B^3 X (B^3)^T.
    """
    once = _box_matrix(_box_radius(sigma), pixels.shape[-1])
    thrice = (once @ once @ once)[:, None]
    pixels.copy_(thrice @ (pixels @ thrice.mT))


def _box_radius(sigma: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Radius r of the box of width 2 r + 1 that blurs like `sigma` in three passes.

    The integer part comes from the variance of a box, the fraction from equating the variances
    (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering").
    """
    variance = sigma.square() / 3
    integer = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    fraction = (2 * integer + 1) * (integer * (integer + 1) - 3 * variance)
    return integer + fraction / (6 * (variance - (integer + 1).square()))


def _box_matrix(radius: Float[Tensor, " N"], side: int) -> Float[Tensor, "N {side} {side}"]:
    """One box pass: row i holds the share of [i - r - 1/2, i + r + 1/2] that covers each pixel."""
    place = torch.arange(side, device=radius.device, dtype=radius.dtype)
    low, high = place - 0.5, place + 0.5
    low[0], high[-1] = -math.inf, math.inf  # borders repeat
    reach = (radius + 0.5)[:, None, None]
    right = torch.minimum(high, place[:, None] + reach)
    left = torch.maximum(low, place[:, None] - reach)
    return (right - left).clamp_min_(0) / (2 * reach)
