"""The map of a folder: its images on a plane, similar ones near one another.

At most `LANDMARKS` images, evenly spread over the folder, are placed by t-SNE (van der Maaten and
Hinton 2008) from their first 50 principal components; every other image where its most similar
landmarks are. So time and memory are bounded, and the same features give the same map.

Shapes: n images, D embed_dim, m landmarks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dino.data.sampler import spread
from dino.features.index import Index
from dino.features.search import nearest
from dino.files import replacing

LANDMARKS = 2000
"""Images that t-SNE places; its time grows faster than their number."""

COMPONENTS, PERPLEXITY = 50, 30.0

NEIGHBOURS = 5
"""Landmarks between which another image is placed."""

CHUNK = 2**14
"""Images that are placed at a time."""


def folder_map(index: Index) -> Float[np.ndarray, "n 2"]:
    """Places from 0 to 1 of the images of an index, kept in its folder."""
    path = index.folder / f"map-{index.about['id']}.npy"
    if path.exists():
        places = np.load(path, allow_pickle=False)
        if places.shape == (len(index), 2):
            return np.asarray(places)
    places = placed(index.features)
    _keep(path, places)
    return places


def _keep(path: Path, places: Float[np.ndarray, "n 2"]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, places)


def placed(features: Float[Tensor, "n D"]) -> Float[np.ndarray, "n 2"]:
    """Places from 0 to 1 of images with features of length 1."""
    chosen = torch.tensor(spread(len(features), LANDMARKS))
    landmarks = features[chosen]
    places = _spread_out(landmarks.numpy())
    if len(chosen) == len(features):
        return places
    result = np.empty((len(features), 2), np.float32)
    for start in range(0, len(features), CHUNK):
        some = features[start : start + CHUNK]
        cosines, rows = nearest(some, landmarks, min(NEIGHBOURS, len(chosen)), unit=True)
        weights = (1 / (2 - 2 * cosines).clamp(min=1e-6)).numpy()  # 1 / squared distance
        weights /= weights.sum(axis=1, keepdims=True)
        result[start : start + CHUNK] = (weights[..., None] * places[rows.numpy()]).sum(axis=1)
    result[chosen.numpy()] = places
    return result


def _spread_out(features: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "m 2"]:
    """t-SNE of landmarks, from 0 to 1; a line for fewer than four, which have no neighbourhoods."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count = len(features)
    if count < 4 or np.ptp(features, axis=0).max() < 1e-6:  # too few, or all alike
        line = (np.arange(count) + 0.5) / count
        return np.stack([line, np.full(count, 0.5)], axis=1).astype(np.float32)
    size = min(COMPONENTS, count, features.shape[1])
    reduced = PCA(size, svd_solver="full").fit_transform(features.astype(np.float64))
    perplexity = min(PERPLEXITY, (count - 1) / 3)
    places = TSNE(perplexity=perplexity, random_state=0, init="pca", n_jobs=1).fit_transform(
        reduced.astype(np.float32)
    )
    low, high = places.min(axis=0), places.max(axis=0)
    return ((places - low) / np.maximum(high - low, 1e-9)).astype(np.float32)
