"""What travels in the page: patch features as integers, in few bytes and with a known error.

Only cosines are computed from the features. They do not change when all features are rotated, so
they are rotated to their principal components, most of which are small, and rounded to multiples
of one step. The bytes of small numbers are few after Huffman's code.

Shapes: n patches of one image, N patches of all images, D embed_dim, K components that travel.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16, UInt8
from PIL import Image
from torch import Tensor

from dino.data.sampler import spread
from dino.show.explorer.patches import PatchFeatures
from dino.show.patch_pca import components

STEP = 2.0**-8
"""Of the rounding of features of length 1.

The error of a cosine is then .0016 on average and below .01 for most networks (the page states the
largest), and a patch of ViT-S takes 190 to 270 bytes, where 8 bits a number take 384."""

QUERIES = 2048
"""Patches whose cosines with all patches are compared with the exact ones."""

WIDEST = 960
"""Longer side of the embedded pictures, in pixels; smaller ones are not enlarged."""


class Rounded(NamedTuple):
    """Features of several images in steps.

    Attributes:
        rows: for each image, a row a patch.
        error: the largest absolute error of a cosine among `pairs`.
        pairs: how many were compared.
    """

    rows: list[Int16[np.ndarray, "_ K"]]
    error: float
    pairs: int


def rounded(features: Sequence[Float[Tensor, "D _ _"]]) -> Rounded:
    """The features of images in common principal components and steps, and the error of cosines.

    Components in which all features are rounded to zero are left out.
    """
    exact = [F.normalize(tokens.flatten(1).T.float(), dim=1) for tokens in features]
    moments = sum(rows.T.double() @ rows.double() for rows in exact)
    axes = torch.linalg.eigh(moments).eigenvectors.flip(1).float()
    steps = [(rows @ axes / STEP).round() for rows in exact]
    used = torch.stack([rows.abs().amax(dim=0) for rows in steps]).amax(dim=0).nonzero()
    count = int(used.max()) + 1 if len(used) else 1
    steps = [rows[:, :count] for rows in steps]
    error, pairs = largest_error(torch.cat(exact), torch.cat(steps))
    return Rounded([rows.to(torch.int16).numpy() for rows in steps], error, pairs)


def largest_error(exact: Float[Tensor, "N D"], steps: Float[Tensor, "N K"]) -> tuple[float, int]:
    """The largest absolute difference of cosines, and the number of pairs that were compared.

    Up to `QUERIES` patches, evenly spread, are compared with all patches.

    Args:
        exact: features of length 1 (or 0).
        steps: the same, rounded.
    """
    coarse, error = F.normalize(steps, dim=1), 0.0
    queries = torch.tensor(spread(len(exact), QUERIES))
    for some in queries.split(256):
        found = coarse[some] @ coarse.T - exact[some] @ exact.T
        error = max(error, float(found.abs().max()))
    return error, len(queries) * len(exact)


# ------------------------------------------------------------------------------------- the content
def content(images: Sequence[PatchFeatures]) -> dict[str, Any]:
    """All that the page needs, as JSON takes it.

    Returns:
        "dimensions", K; "wide", how many of them take two bytes; "heads", 0 without attention;
        "error" and "pairs" of `Rounded`; and "images", each with "name", "width" and "height" of
        the full image, "rows" and "columns" of patches, "picture" (a data URI), "peaks", the
        largest attention of each head, and "data": base64 of the deflated bytes of `packed`.
    """
    found = rounded([image.features for image in images])
    largest = np.max([np.abs(rows).max(axis=0) for rows in found.rows], axis=0)
    wide = int(np.flatnonzero(largest > 127).max(initial=-1)) + 1
    colors = components([image.features for image in images])
    heads = 0 if images[0].attention is None else len(images[0].attention)
    return {
        "dimensions": found.rows[0].shape[1],
        "wide": wide,
        "heads": heads,
        "error": found.error,
        "pairs": found.pairs,
        "images": [
            _image(image, rows, own_colors, wide)
            for image, rows, own_colors in zip(images, found.rows, colors, strict=True)
        ],
    }


def _image(
    image: PatchFeatures,
    rows: Int16[np.ndarray, "n K"],
    colors: UInt8[np.ndarray, "h w 3"],
    wide: int,
) -> dict[str, Any]:
    _, height, width = image.features.shape
    attention = torch.empty(0, height, width) if image.attention is None else image.attention
    peaks = attention.flatten(1).amax(dim=1)
    shares = (attention / peaks.clamp(min=1e-30)[:, None, None] * 65535).round()
    data = packed(rows, wide, shares.numpy().astype(np.uint16), colors)
    return {
        "name": image.name,
        "width": image.picture.width,
        "height": image.picture.height,
        "rows": height,
        "columns": width,
        "picture": _data_uri(image.picture),
        "peaks": peaks.tolist(),
        "data": base64.b64encode(data).decode(),
    }


def packed(
    rows: Int16[np.ndarray, "n K"],
    wide: int,
    attention: np.ndarray,
    colors: UInt8[np.ndarray, "h w 3"],
) -> bytes:
    """The arrays of one image, deflated.

    One after the other: the low bytes of the features, component by component; the high bytes of
    the first `wide` components, the only ones beyond -128 to 127; the attention, 65535 at the peak
    of its head, first all low bytes, then all high ones; the colours.
    """
    numbers = np.ascontiguousarray(rows.T)
    parts = (
        (numbers & 255).astype(np.uint8),
        (numbers[:wide] >> 8).astype(np.int8),
        (attention & 255).astype(np.uint8),
        (attention >> 8).astype(np.uint8),
        colors,
    )
    # Features are noise to a search for repeats: it takes longer and finds nothing.
    coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 8, zlib.Z_HUFFMAN_ONLY)
    return b"".join(coder.compress(part.tobytes()) for part in parts) + coder.flush()


def _data_uri(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "jpeg", quality=85, comment="")  # nor EXIF: a page may be mailed
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
