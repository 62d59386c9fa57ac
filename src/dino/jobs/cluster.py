"""`dino cluster`: images sorted into groups by their features, and how stable the groups are.

The methods are those of scikit-learn, on features of length 1, so that Euclidean distance orders
images as cosine similarity does.

Shapes: n images, D width, K clusters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.table import Table

from dino.data.sampler import spread
from dino.data.sources.open import open_source
from dino.features.command import TRAINED, Seed, number_table
from dino.features.contact_sheet import ImagesByPath, save_sheet
from dino.features.search import directions
from dino.features.table import FeatureTable
from dino.files import UserError, atomic_csv
from dino.jobs.command import IndexedJobSettings, job
from dino.progress import bar
from dino.runtime import ranks
from dino.settings import Range, validated

Method = Literal["kmeans", "agglomerative", "hdbscan"]

MOST: dict[Method, int] = {"agglomerative": 20_000, "hdbscan": 50_000}
"""Most images of the methods whose memory or time grows with their square."""

SHARE = 0.8
"""Of the images, in each repetition that measures stability."""

ROW, SHEET, ROWS = 8, 48, 40
"""Images of a cluster on the sheet of all, on its own sheet, and most rows of the former."""

Labels = Int[np.ndarray, " n"]


def cluster(
    features: Float[np.ndarray, "n D"], method: Method, clusters: int, least: int, seed: int
) -> Labels:
    """The cluster of each image, from 0, the largest first; -1 for images of none (HDBSCAN).

    Args:
        features: of length 1.
        method: kmeans and agglomerative (Ward's) make K clusters; hdbscan finds how many there are.
        clusters: K.
        least: with hdbscan, the fewest images of a cluster.
        seed: of the starts of k-means, of which the best of three is taken.
    """
    if method == "kmeans":
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():  # of fewer different images than clusters
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = KMeans(clusters, n_init=3, random_state=seed % 2**32).fit_predict(features)
    elif method == "agglomerative":
        from sklearn.cluster import AgglomerativeClustering

        found = AgglomerativeClustering(clusters).fit_predict(features)
    else:
        from sklearn.cluster import HDBSCAN

        found = HDBSCAN(min_cluster_size=least, copy=True).fit_predict(features)
    sizes = np.bincount(found[found >= 0], minlength=1)
    place = np.empty(len(sizes), dtype=np.int64)
    place[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return np.where(found >= 0, place[found], -1)


def stability(
    labels: Labels, again: Callable[[Int[np.ndarray, " m"]], Labels], repeats: int, seed: int
) -> Float[np.ndarray, " K"]:
    """How well each cluster is found again in a part of the images (Hennig 2007).

    The images of a cluster that are in a part of `SHARE` of all are compared with the cluster of
    the part with which their Jaccard index is largest; the mean over repetitions is 1 for a cluster
    that is always found, and below about 0.6 for one that is not there.

    Args:
        labels: of all images; -1 for none.
        again: clusters the images with these indices.
        repeats: parts, drawn without replacement.
        seed: of the parts.
    """
    count = labels.max(initial=-1) + 1
    found, generator = np.zeros((repeats, count)), np.random.default_rng(seed)
    for row in found:
        part = np.sort(generator.choice(len(labels), round(SHARE * len(labels)), replace=False))
        other, before = again(part), labels[part]
        others = other.max(initial=-1) + 1
        if others == 0:
            continue
        inside = (before >= 0) & (other >= 0)
        pairs = before[inside] * others + other[inside]
        both = np.bincount(pairs, minlength=count * others).reshape(count, others)
        one = np.bincount(before[before >= 0], minlength=count)[:, None]
        two = np.bincount(other[other >= 0], minlength=others)
        row[:] = (both / np.maximum(one + two - both, 1)).max(axis=1)
    return found.mean(axis=0)


def typicality(features: Float[np.ndarray, "n D"], labels: Labels) -> Float[np.ndarray, " n"]:
    """Cosine similarity of each image to the mean of its cluster; that of -1 is one too."""
    result = np.zeros(len(features), dtype=np.float32)
    for number in np.unique(labels):
        rows = np.flatnonzero(labels == number)
        mean = features[rows].mean(axis=0)
        result[rows] = features[rows] @ (mean / max(float(np.linalg.norm(mean)), 1e-12))
    return result


def agreement(truth: Labels, labels: Labels) -> dict[str, float]:
    """Of clusters with classes: "nmi" and "ari" (0 for chance, 1 for the same), all images."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return {
        "nmi": float(normalized_mutual_info_score(truth, labels)),
        "ari": float(adjusted_rand_score(truth, labels)),
    }


# ------------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class Cluster(IndexedJobSettings):
    """Sort images into groups by their features."""

    examples: ClassVar[dict[str, str]] = {"out": "clusters"}

    method: Method = "kmeans"
    """kmeans, agglomerative (up to 20,000 images), or hdbscan (up to 50,000), which finds how many
    clusters there are and leaves images out that belong to none."""
    clusters: Annotated[int, Range(low=2, high=10**5)] = 10
    """How many, for kmeans and agglomerative."""
    least: Annotated[int, Range(low=2, high=10**6)] = 5
    """With hdbscan, the fewest images of a cluster."""
    repeats: Annotated[int, Range(low=0, high=100)] = 5
    """Parts of the images that are clustered again, to measure stability; 0 for none."""
    seed: Seed = 0
    """Of k-means, and of the parts."""


def run(settings: Cluster) -> dict[str, Any]:
    """`dino cluster`: a table, clusters.csv, a sheet of all clusters and one of each, cluster.json.

    Returns:
        The JSON's "clusters": by network "count", "unassigned", "stability" and, for images with
        classes, "nmi" and "ari".

    Raises:
        UserError: for weights or images that cannot be used, or too few or many images.
    """
    settings = validated(settings)
    with job("cluster", settings, settings.data) as started:
        source = open_source(settings.data, started.pixels)
        _check_count(len(source), settings)
        tables = {n: settings.images(n, of, source) for n, of in started.networks.items()}
        if not ranks().main:
            return {}
        results = {name: _clustered(table, name, settings) for name, table in tables.items()}
        content = {name: measured for name, (_, _, measured) in results.items()}
        labels, stable, _ = results[TRAINED]
        images = tables[TRAINED]
        typical = typicality(_unit(images), labels)
        files = _save(images, labels, typical, ImagesByPath(source), started.out)
        clusters = [
            {"cluster": number + 1, "images": int((labels == number).sum()), "stability": value}
            for number, value in enumerate(stable.tolist())
        ]
        started.report(
            {"clusters": content, "each": clusters, "images": len(images)},
            _table(content, len(images), settings),
            files=files,
        )
    return content


def _check_count(count: int, settings: Cluster) -> None:
    most = MOST.get(settings.method, count)
    if count > most:
        raise UserError(
            f"--method {settings.method} takes at most {most:,} images, not {count:,}: use kmeans"
        )
    if settings.method != "hdbscan" and settings.clusters > SHARE * count:
        raise UserError(f"{count:,} images are too few for --clusters {settings.clusters}")
    if settings.method == "hdbscan" and settings.least > count:
        raise UserError(f"{count:,} images are too few for --least {settings.least}")


def _unit(table: FeatureTable) -> Float[np.ndarray, "n D"]:
    return directions(table.finite(), torch.device("cpu")).numpy()


def _clustered(
    table: FeatureTable, name: str, settings: Cluster
) -> tuple[Labels, Float[np.ndarray, " K"], dict[str, float | int]]:
    """The clusters of the images, the stability of each, and the numbers that are reported."""
    features = _unit(table)
    least = min(settings.clusters, len(features))

    def clustered(rows: Int[np.ndarray, " m"] | None) -> Labels:
        chosen = features if rows is None else features[rows]
        result = cluster(chosen, settings.method, least, settings.least, settings.seed)
        advance(1)
        return result

    with bar(f"{name}, clustering", 1 + settings.repeats) as advance:
        labels = clustered(None)
        stable = stability(labels, clustered, settings.repeats, settings.seed)
    count = int(labels.max(initial=-1)) + 1
    measured: dict[str, float | int] = {"count": count, "unassigned": int((labels < 0).sum())}
    if settings.repeats and count:
        sizes = np.bincount(labels[labels >= 0])
        measured["stability"] = float(np.average(stable, weights=sizes))
    if table.labels is not None:
        measured |= agreement(table.labels.numpy(), labels)
    return labels, stable, measured


def _table(content: dict[str, dict[str, float | int]], images: int, settings: Cluster) -> Table:
    names = ("stability", "nmi", "ari")
    shown = [name for name in names if any(name in of for of in content.values())]
    rows = {
        name: [
            f"{of['count']:,}",
            f"{of['unassigned']:,}",
            *(f"{of[key]:.3f}" if key in of else "" for key in shown),
        ]
        for name, of in content.items()
    }
    head = [{"nmi": "NMI with classes", "ari": "ARI with classes"}.get(key, key) for key in shown]
    columns = ["features", "clusters", "in none", *head]
    return number_table(f"{settings.method}, {images:,} images", columns, rows)


def _save(
    table: FeatureTable,
    labels: Labels,
    typical: Float[np.ndarray, " n"],
    images: ImagesByPath,
    out: Path,
) -> list[Path]:
    """The list of all images by cluster, most typical first, and the contact sheets."""
    listing, sheet = out / "clusters.csv", out / "sheet.png"
    order = np.lexsort((-typical, np.where(labels < 0, len(labels), labels)))
    lines = (
        (
            str(labels[row] + 1) if labels[row] >= 0 else "",
            table.paths[row],
            f"{typical[row]:.6f}",
            images.class_name(table.paths[row]),
        )
        for row in order.tolist()
    )
    atomic_csv(listing, ("cluster", "path", "similarity", "class"), lines)
    count = int(labels.max(initial=-1)) + 1
    members = [
        [i for i in order.tolist() if labels[i] == number] for number in range(min(count, ROWS))
    ]
    if not members:
        return [listing]

    def cells(rows: Sequence[int]) -> list[Any]:
        return [images.cell(table.paths[i], images.class_name(table.paths[i])) for i in rows]

    first = [
        [
            images.cell(table.paths[one[0]], f"cluster {number}: {len(one):,}", "plain"),
            *cells(one[1:ROW]),
        ]
        for number, one in enumerate(members, start=1)
    ]
    shown = f"all {count}" if count <= ROWS else f"the {ROWS} largest of {count:,}"
    save_sheet(sheet, first, f"Clusters: {shown}, a row each, the most typical images first.")
    for number, one in enumerate(members, start=1):
        chosen = [one[i] for i in spread(len(one), SHEET)]
        rows = [cells(chosen[start : start + ROW]) for start in range(0, len(chosen), ROW)]
        title = f"Cluster {number}: {len(chosen)} of {len(one):,} images, the most typical first."
        save_sheet(out / f"cluster-{number}.png", rows, title)
    return [listing, sheet]
