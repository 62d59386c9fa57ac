"""The principal components of patch features as colours.

Shapes: D embed_dim, h w patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor


def components(
    patches: Sequence[Float[Tensor, "D _ _"]], spread: float = 0.98
) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """The first three principal components of patch tokens as red, green and blue.

    One analysis for all images, so that a colour means the same in each. The result does not
    depend on the order of the images, nor on the scale or offset of the tokens: a component's
    largest loading is made positive, and the middle `spread` of its values fills the range.

    Args:
        patches: tokens of one or several images on their grids.
        spread: share of the values that are not clipped, in (0, 1].

    Returns:
        One array an image; a component that does not exist (constant tokens) is mid-grey.
    """
    from sklearn.decomposition import PCA

    rows = np.concatenate([tokens.flatten(1).T.double().cpu().numpy() for tokens in patches])
    count = min(3, *rows.shape)
    solver = "covariance_eigh" if len(rows) >= rows.shape[1] else "full"
    pca = PCA(count, svd_solver=solver)
    with np.errstate(invalid="ignore"):  # shares of variance of constant tokens are 0 / 0
        scores = pca.fit_transform(rows)
    values = np.full((len(rows), 3), 0.5)
    # Tokens are single precision: variation below a millionth of their length is rounding.
    significant = pca.singular_values_ > 1e-6 * np.linalg.norm(rows)
    low, high = np.quantile(scores, [(1 - spread) / 2, (1 + spread) / 2], axis=0)
    usable = significant & (high > low)
    shares = (scores - low)[:, usable] / (high - low)[usable]
    values[:, :count][:, usable] = shares.clip(0, 1)
    pixels = (255 * values).round().astype(np.uint8)
    ends = np.cumsum([tokens[0].numel() for tokens in patches])[:-1]
    return [
        rows.reshape(*tokens.shape[1:], 3)
        for rows, tokens in zip(np.split(pixels, ends), patches, strict=True)
    ]
