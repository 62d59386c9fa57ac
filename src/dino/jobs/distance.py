"""`dino distance`: how far apart two folders of images are in feature space, with an interval.

Two distances of the distributions of features: that of Frechet (Heusel et al. 2017), of Gaussians
with their means and covariances, and that of a kernel (Binkowski et al. 2018), which compares more
than these and is unbiased for any number of images. Both were published for features of Inception;
with those of DINO they agree better with people (Stein et al. 2023).

Shapes: n images, D width, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
import tyro
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from dino.data.sources.open import open_source
from dino.features.command import TRAINED, Count, ExtractionSettings, Seed, number_table
from dino.features.extractor import extract
from dino.features.raw_pixels import RawPixels
from dino.files import UserError
from dino.jobs.command import PIXELS, JobSettings, job
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.settings import validated

GROUPS = 20
"""Parts of the images of which each in turn is left out, to find bias and standard error."""

ROWS = 2**12
"""Features at a time."""

KERNEL_IMAGES = 10_000
"""Most images of each folder that the kernel compares, pair by pair; they are drawn at random."""

Measure = Callable[[int | None], float]
"""A distance without one of the groups; of all images for None."""


class Estimate(NamedTuple):
    """A number with its confidence interval of 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def jackknife(measure: Measure) -> Estimate:
    """An estimate whose bias is corrected, with an interval: the delete-a-group jackknife.

    What is left out once is 1 / `GROUPS` of both folders. The correction removes the bias that
    shrinks as 1 / n, which makes a Frechet distance of few images too large; the interval is that
    of Student's t with `GROUPS` - 1 degrees of freedom.
    """
    everything, parts = measure(None), np.array([measure(group) for group in range(GROUPS)])
    value = GROUPS * everything - (GROUPS - 1) * parts.mean()
    error = ((GROUPS - 1) / GROUPS * ((parts - parts.mean()) ** 2).sum()) ** 0.5
    half = student.ppf(0.975, GROUPS - 1) * error
    return Estimate(float(value), float(value - half), float(value + half))


# ------------------------------------------------------------------------------------- Frechet
@dataclass(frozen=True)
class Moments:
    """Sums over images of their features, and of the products of all pairs of numbers."""

    count: int
    total: Float[Tensor, " D"]
    products: Float[Tensor, "D D"]

    @classmethod
    def of(cls, groups: Sequence[Float[Tensor, "_ D"]], origin: Float[Tensor, " D"]) -> Moments:
        """In float64, relative to `origin`, which is best near the mean."""
        total = torch.zeros_like(origin)
        products = torch.zeros(len(origin), len(origin), dtype=origin.dtype)
        for rows in (rows for group in groups for rows in group.split(ROWS)):
            shifted = rows.double() - origin
            total += shifted.sum(dim=0)
            products.addmm_(shifted.T, shifted)
        return cls(sum(map(len, groups)), total, products)

    def without(self, part: Moments) -> Moments:
        """Those of the other images."""
        return Moments(
            self.count - part.count, self.total - part.total, self.products - part.products
        )

    @property
    def mean(self) -> Float[Tensor, " D"]:
        """Relative to the origin."""
        return self.total / self.count

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """Unbiased: of n images the divisor is n - 1."""
        return (self.products - self.count * self.mean.outer(self.mean)) / (self.count - 1)


def frechet(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of moments with the same origin.

    The trace of the root is the sum of the roots of the eigenvalues of R S2 R', with S1 = R' R: a
    symmetric matrix, so that nothing becomes complex. R is Cholesky's factor, or where S1 has none,
    since there are fewer images than numbers, its root.
    """
    one, two = first.covariance, second.covariance
    factor, failed = torch.linalg.cholesky_ex(one, upper=True)
    if failed:
        variances, vectors = torch.linalg.eigh(one)
        factor = variances.clamp(min=0).sqrt()[:, None] * vectors.T
    common = torch.linalg.eigvalsh(factor @ two @ factor.T).clamp(min=0).sqrt().sum()
    apart = (first.mean - second.mean).square().sum()
    return float(apart + one.trace() + two.trace() - 2 * common)


def frechet_distance(
    first: Sequence[Float[Tensor, "_ D"]],
    second: Sequence[Float[Tensor, "_ D"]],
    advance: Callable[[int], object] = lambda count: None,
) -> Estimate:
    """The Frechet distance of features that are divided into groups."""
    origin = first[0].double().mean(dim=0)
    sides = first, second
    totals = [Moments.of(side, origin) for side in sides]

    def measure(left_out: int | None) -> float:
        advance(1)
        if left_out is None:
            return frechet(*totals)
        parts = (Moments.of(side[left_out : left_out + 1], origin) for side in sides)
        return frechet(*(total.without(part) for total, part in zip(totals, parts, strict=True)))

    return jackknife(measure)


# ------------------------------------------------------------------------------------- kernel
def kernel_distance(
    first: Sequence[Float[Tensor, "_ D"]],
    second: Sequence[Float[Tensor, "_ D"]],
    advance: Callable[[int], object] = lambda count: None,
) -> Estimate:
    """The squared maximum mean discrepancy with the kernel (x y / D + 1)^3; unbiased.

    The sums of the kernel over pairs of groups give the estimates without each group too.
    """
    count, groups = len(first), [*first, *second]
    sizes = np.array([len(group) for group in groups])
    rows, starts = torch.cat(groups), np.cumsum(sizes) - sizes
    sums = np.zeros((2 * count, 2 * count))
    for number, (group, start) in enumerate(zip(groups, starts, strict=True)):
        by_row = _kernel_sums(group, rows[start:])  # the matrix of sums is symmetric
        sums[number, number:] = np.add.reduceat(by_row, starts[number:] - start)
        sums[number:, number] = sums[number, number:]
        itself = group.double().square().sum(dim=1) / group.shape[1]
        sums[number, number] -= float((itself + 1).pow(3).sum())
        advance(1)

    def measure(left_out: int | None) -> float:
        kept = np.array([group != left_out for group in range(count)])
        value = 0.0
        for side in (np.append(kept, ~kept & False), np.append(~kept & False, kept)):
            images = sizes[side].sum()
            value += sums[np.ix_(side, side)].sum() / (images * (images - 1))
        one, two = kept.nonzero()[0], kept.nonzero()[0] + count
        pairs = sizes[one].sum() * sizes[two].sum()
        return float(value - 2 * sums[np.ix_(one, two)].sum() / pairs)

    return jackknife(measure)


def _kernel_sums(
    first: Float[Tensor, "n D"], second: Float[Tensor, "m D"]
) -> Float[np.ndarray, " m"]:
    """The kernel of each row of `second` with all of `first`, summed."""
    sums = torch.zeros(len(second), dtype=torch.float64)
    for columns, found in zip(second.split(ROWS), sums.split(ROWS), strict=True):
        for rows in first.split(ROWS):
            products = rows.double() @ columns.double().T / first.shape[1]
            found += (products + 1).pow_(3).sum(dim=0)
    return sums.numpy()


def divided(features: Float[Tensor, "n D"], seed: int) -> list[Float[Tensor, "_ D"]]:
    """`GROUPS` random groups of equal size, but for one image."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return [features[rows] for rows in order.tensor_split(GROUPS)]


def _drawn(groups: Sequence[Float[Tensor, "_ D"]]) -> list[Float[Tensor, "_ D"]]:
    """The first images of each group, which are in random order, `KERNEL_IMAGES` in all."""
    return [group[: KERNEL_IMAGES // GROUPS] for group in groups]


# ------------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class Distance(JobSettings, ExtractionSettings):
    """Measure how far apart two folders of images are in feature space."""

    examples: ClassVar[dict[str, str]] = {"data": "real/ generated/", "out": "distance"}

    data: Annotated[tuple[str, str], tyro.conf.arg(metavar="PATH PATH")]
    """Two folders or lists of images."""
    batch: Count = 64
    """Images at a time."""
    seed: Seed = 0
    """Of the division into groups, from which the intervals come."""

    def networks(self, device: torch.device, *, rgb: bool = False) -> dict[str, Backbone]:
        """As of all jobs, but "pixels" are 16 x 16: a covariance needs more images than numbers."""
        named = super().networks(device, rgb=rgb)
        if PIXELS in named:
            named[PIXELS] = RawPixels(named[TRAINED], 16).eval()
        return named


def run(settings: Distance) -> dict[str, Any]:
    """`dino distance`: one table, and distance.json.

    Returns:
        The JSON's "distance": by network "frechet" and "kernel", each with "value" and "interval".

    Raises:
        UserError: for weights or images that cannot be used, or fewer than two images a group.
    """
    settings = validated(settings)
    with job("distance", settings, *settings.data) as started:
        sources = [open_source(name, started.pixels) for name in settings.data]
        for name, source in zip(settings.data, sources, strict=True):
            if len(source) < 2 * GROUPS:
                raise UserError(
                    f"{name} has {len(source)} images: an interval needs at least {2 * GROUPS} in "
                    "each folder, better thousands"
                )
        found: dict[str, dict[str, Estimate]] = {}
        for name, network in started.networks.items():
            options = {"batch": settings.batch, "title": name, **settings.extraction()}
            tables = [extract(network, source, **options) for source in sources]
            one, two = (divided(table.finite(), settings.seed) for table in tables)
            with bar(f"{name}, distances", 3 * GROUPS + 1) as advance:
                found[name] = {
                    "frechet": frechet_distance(one, two, advance),
                    "kernel": kernel_distance(_drawn(one), _drawn(two), advance),
                }
        count = [len(table) for table in tables]
        content = {
            name: {kind: {"value": e.value, "interval": [e.low, e.high]} for kind, e in of.items()}
            for name, of in found.items()
        }
        lines = [f"{count[0]:,} and {count[1]:,} images; in brackets the interval of 95 %"]
        if min(count) <= started.network.embed_dim:
            lines.append(
                f"a covariance of {started.network.embed_dim} numbers needs more images than "
                f"{min(count):,}: trust the kernel distance, or add images"
            )
        table = number_table(
            f"distance of {settings.data[0]} and {settings.data[1]}",
            ["features", "Frechet", "kernel"],
            {name: [str(of["frechet"]), str(of["kernel"])] for name, of in found.items()},
        )
        started.report({"distance": content, "images": count}, table, *lines)
    return content
