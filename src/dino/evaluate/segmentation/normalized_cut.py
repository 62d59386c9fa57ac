"""An object by the normalised cut of the graph of patches (TokenCut, arXiv 2202.11539).

Shapes: D width, h w patches, n = h w.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from dino.evaluate.segmentation.discovered import Discovered, connected_to, stretched

UNLIKE = 1e-5
"""Weight of an edge between patches that are not alike (epsilon of the paper)."""

RESTARTS = 100
"""Of Lanczos' method at most; graphs of images need a few, a long chain of patches does not end."""


def normalized_cut(features: Float[Tensor, "D h w"], threshold: float = 0.2) -> Discovered:
    """The object that the best division of the patches in two separates from the background.

    An edge weighs 1 where the cosine similarity of two patches exceeds the threshold, else epsilon.
    The second eigenvector is divided at its mean; the object is the side of its largest absolute
    value, and of that side what is connected with this patch. The saliency is the eigenvector,
    which is larger in the object.

    Args:
        features: of the patches.
        threshold: tau of the paper, which takes 0.2.

    Returns:
        The object; the entire image where all patches are alike.
    """
    grid = features.shape[1:]
    rows = F.normalize(features.flatten(1).double().cpu(), dim=0).numpy()
    alike = rows.T @ rows > threshold
    if alike.all():
        return Discovered(np.ones(grid, dtype=bool), np.ones(grid))
    vector = second_eigenvector(np.where(alike, 1.0, UNLIKE))
    seed = int(np.abs(vector).argmax())
    if vector[seed] < vector.mean():
        vector = -vector
    mask = (vector > vector.mean()).reshape(grid)
    return Discovered(connected_to(seed, mask), stretched(vector.reshape(grid)))


def second_eigenvector(weights: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """The solution y of (D - W) y = lambda D y with the second smallest lambda.

    D holds the sums of W's rows. With z = D^(1/2) y this is the second largest eigenvalue of
    D^(-1/2) W D^(-1/2), whose largest is 1 and belongs to D^(1/2) 1. That one is subtracted, and
    Lanczos' method finds the next from a fixed start, so that equal graphs have equal results.
    Where it does not converge a dense solver is taken.

    Args:
        weights: W, symmetric and positive, of two nodes or more.
    """
    root = np.sqrt(weights.sum(axis=1))
    first = root / np.linalg.norm(root)
    matrix = weights / root / root[:, None]
    matrix -= first[:, None] * first
    start = np.random.default_rng(0).standard_normal(len(matrix))
    try:
        _, vectors = eigsh(matrix, k=1, which="LA", v0=start, maxiter=RESTARTS)
    except ArpackNoConvergence:
        _, vectors = eigh(matrix, subset_by_index=[len(matrix) - 1] * 2)
    found: Float[np.ndarray, " n"] = vectors[:, 0] / root
    return found
