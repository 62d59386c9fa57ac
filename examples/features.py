"""Use a network's features: a classifier of scikit-learn, and similar images by FAISS.

    python examples/features.py --weights runs/photos --images labelled/

The classes are the sub-folders of `labelled/`. FAISS is used where it is installed
(`pip install faiss-cpu`), and scikit-learn otherwise; both searches are exact.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import NearestNeighbors

import dino
from dino.data.sources.open import Folder


def most_similar(features: np.ndarray, count: int) -> np.ndarray:
    """Rows of the `count` most similar others of each row, by the cosine: [n, count]."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    try:
        import faiss
    except ImportError:
        search = NearestNeighbors(n_neighbors=count, metric="cosine").fit(unit)
        return search.kneighbors(return_distance=False)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    found = index.search(unit, count + 1)[1]
    # Each row finds itself too, though not always first: duplicates are equally similar.
    others = [row[row != number][:count] for number, row in enumerate(found)]
    return np.stack(others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="a run folder, file or published name")
    parser.add_argument("--images", required=True, help="a folder with a sub-folder a class")
    parser.add_argument("--similar", type=int, default=3, help="similar images of each")
    given = parser.parse_args()

    backbone = dino.load(given.weights)
    print(backbone)
    folder = Folder(given.images)
    if folder.labels is None:
        parser.error(f"{given.images} has no classes: give a folder with a sub-folder a class")
    paths = [folder.path(index) for index in range(len(folder))]
    features = backbone.embed(paths)

    classifier = LogisticRegression(max_iter=1000)
    accuracy = cross_val_score(classifier, features, folder.labels, cv=3).mean()
    print(f"logistic regression, 3-fold: {100 * accuracy:.1f} % of {len(paths)} images")

    for path, rows in zip(paths, most_similar(features, given.similar), strict=True):
        print(path, "is similar to", *(paths[row] for row in rows))

    images = torch.stack([backbone.preprocess(path) for path in paths[:2]])
    with torch.no_grad():
        f = backbone.features(images, attention=backbone.heads > 0)
    print("patch features", list(f.patches.shape))
    if f.attention is not None:
        print("attention maps", list(f.attention_maps.shape))


if __name__ == "__main__":
    main()
