"""Classification of pixels from frozen patch tokens: a linear classifier, and nearest neighbours.

The protocols by which the paper's successors measure local features. Both learn from the share of
each class among the pixels of a patch, and give scores of classes for the patches of an image,
which are enlarged bilinearly to the size of the image.

Shapes: n patches of the training images, q patches of others, D width, K classes, h w patches,
H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dino.data.images.decode import Sample
from dino.data.images.masks import VOID, Ids
from dino.data.images.patch_grid import patch_input
from dino.features.search import nearest
from dino.features.table import my_share
from dino.files import UserError
from dino.models.attention import attention_maps
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import Precision, autocast, gather_objects, memory_errors, ranks

Scorer = Callable[[Float[Tensor, "q D"]], Float[Tensor, "q K"]]
"""From the features of patches to a score for each class."""


class Scene(Protocol):
    """An image with a mask of its classes."""

    @property
    def mask(self) -> Path:
        """The file of the mask."""

    def read(self) -> tuple[Sample, Ids]:
        """The image and its mask, which have the same height and width."""


@dataclass(frozen=True)
class PatchExtractor:
    """Extracts patch tokens and attention of images, which are resized to complete patches.

    Attributes:
        backbone: the network, in evaluation mode.
        size: side of the square in pixels that an image is resized to, or of its shorter side.
        keep_aspect: keep the ratio of the sides, to the nearest patch and at most 8, rather than
            make a square. The paper shows attention on squares.
        precision: of the network.
    """

    backbone: Backbone
    size: int = 480
    keep_aspect: bool = False
    precision: Precision = "fp32"

    def prepare(self, image: Sample) -> Float[Tensor, "1 C H W"]:
        """An image as the network's input, with nothing cropped.

        Raises:
            UserError: if no patch fits.
        """
        patch = self.backbone.patch_size or 1
        transform, device = self.backbone.preprocessing, next(self.backbone.parameters()).device
        return patch_input(image, self.size, patch, self.keep_aspect, transform, device)

    @torch.inference_mode()
    def features(self, image: Sample) -> Float[Tensor, "D h w"]:
        """Patch tokens of an image after the final norm."""
        images = self.prepare(image)
        with memory_errors("--size"), autocast(images.device, self.precision):
            return self.backbone.features(images).patches[-1, 0].float()

    def attention(self, image: Sample) -> Float[Tensor, "heads h w"]:
        """Attention of the last block's CLS token to the patches."""
        images = self.prepare(image)
        with memory_errors("--size"), autocast(images.device, self.precision):
            return attention_maps(self.backbone, images)[0].float()


class Bank(NamedTuple):
    """Training patches.

    Attributes:
        features: of each patch, on the CPU.
        shares: of each class among the patch's pixels that are not void.
        weights: how many pixels those are.
        classes: the number that masks have for each class.
    """

    features: Float[Tensor, "n D"]
    shares: Float[Tensor, "n K"]
    weights: Float[Tensor, " n"]
    classes: list[int]


def training_patches(
    extractor: PatchExtractor, scenes: Sequence[Scene], limit: int, seed: int, title: str
) -> Bank:
    """The patches of training images, at most `limit`, drawn evenly from all images.

    Patches of void alone are left out. The draw depends only on the seed and the image's index.

    Raises:
        UserError: if there is only one class.
    """
    mine = my_share(range(len(scenes)))
    most = max(1, limit // len(scenes))
    rows: list[tuple[Tensor, Tensor]] = []
    with bar(f"{title}, training images", len(mine), shown=ranks().main) as advance:
        for index in mine:
            picture, ids = scenes[index].read()
            features = extractor.features(picture)
            _, height, width = features.shape
            counts = patch_counts(ids, (height, width), range(VOID))[:-1].flatten(1).T
            usable = counts.sum(dim=1).nonzero().squeeze(1)
            drawn = np.random.default_rng((seed, index)).permutation(len(usable))[:most]
            chosen = usable[torch.from_numpy(np.sort(drawn))]
            rows.append((features.flatten(1).T.cpu()[chosen], counts[chosen].to(torch.int32)))
            advance(1)
    tokens, counted = zip(*(row for share in gather_objects(rows) for row in share), strict=True)
    counts = torch.cat(counted)
    classes = counts.sum(dim=0).nonzero().squeeze(1).tolist()
    if len(classes) < 2:
        raise UserError(
            f"the {len(scenes)} training masks, such as {scenes[0].mask}, hold only one class"
        )
    counts = counts[:, classes].float()
    weights = counts.sum(dim=1)
    return Bank(torch.cat(tokens), counts / weights[:, None], weights, classes)


def patch_counts(
    ids: Ids, grid: tuple[int, int], numbers: Sequence[int]
) -> Int[Tensor, "{len(numbers)+1} {grid[0]} {grid[1]}"]:
    """How many pixels of each kind lie in each patch; the last row counts those of all others.

    A pixel lies in the patch that holds its upper left corner when the grid covers the image: the
    patch whose value it gets when the grid is enlarged by nearest neighbours.

    Args:
        ids: a mask; void counts nowhere.
        grid: height and width in patches.
        numbers: the kinds.
    """
    height, width = ids.shape
    rows = np.arange(height) * grid[0] // height
    columns = np.arange(width) * grid[1] // width
    kind = np.full(256, len(numbers))
    kind[list(numbers)] = range(len(numbers))
    place = (kind[ids] * grid[0] + rows[:, None]) * grid[1] + columns
    total = (len(numbers) + 1) * grid[0] * grid[1]
    counts = np.bincount(place[ids != VOID], minlength=total)
    return torch.from_numpy(counts).view(len(numbers) + 1, *grid)


# ---------------------------------------------------------------------------------- two scorers
def linear(bank: Bank, penalty: float, steps: int, device: torch.device) -> Scorer:
    """A linear classifier of standardised features, at the minimum of its objective.

    The objective is the mean cross-entropy over pixels, each with the scores of its patch, and half
    the penalty times the squared weights. It is convex; L-BFGS finds the minimum from zero, with no
    learning rate and no random numbers.

    Args:
        bank: training patches; moved to `device`.
        penalty: not negative.
        steps: iterations at most.
        device: where to compute.
    """
    x, shares = bank.features.to(device), bank.shares.to(device)
    weights = (bank.weights / bank.weights.sum()).to(device)
    mean = weights @ x
    deviation = (weights @ (x - mean).square()).sqrt().clamp(min=1e-6)
    x = (x - mean) / deviation
    matrix = torch.zeros(x.shape[1], shares.shape[1], device=device, requires_grad=True)
    offset = torch.zeros(shares.shape[1], device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [matrix, offset],
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(offset, x, matrix)
        loss = -(weights @ (shares * logits.log_softmax(dim=1)).sum(dim=1))
        loss = loss + penalty / 2 * matrix.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    slope = (matrix / deviation[:, None]).detach()
    shift = (offset - mean @ slope).detach()
    return lambda features: torch.addmm(shift, features, slope)


def neighbours(bank: Bank, k: int, temperature: float, device: torch.device) -> Scorer:
    """Shares of classes of the k most similar patches, weighted exp(similarity / temperature).

    The protocol of Balažević et al. 2023 (arXiv 2306.01667) without its augmentation.

    Args:
        bank: training patches; moved to `device`.
        k: at least 1; clipped to the bank.
        temperature: positive.
        device: where to compute.
    """
    features, shares = bank.features.to(device), bank.shares.to(device)

    def score(queries: Float[Tensor, "q D"]) -> Float[Tensor, "q K"]:
        similarity, index = nearest(queries, features, min(k, len(features)), device=device)
        weights = (similarity / temperature).softmax(dim=1)
        return torch.einsum("qk,qkc->qc", weights, shares[index])

    return score


# ------------------------------------------------------------------------------------- the score
def confusions(
    extractor: PatchExtractor,
    scenes: Sequence[Scene],
    scorers: dict[str, Scorer],
    classes: Sequence[int],
    title: str,
) -> dict[str, Int[np.ndarray, "256 256"]]:
    """Pixels of all images by true and by predicted class, for each scorer; void is left out."""
    totals = {name: np.zeros((256, 256), dtype=np.int64) for name in scorers}
    mine = my_share(range(len(scenes)))
    numbers = np.array(classes, dtype=np.uint8)
    with bar(f"{title}, images", len(mine), shown=ranks().main) as advance:
        for index in mine:
            picture, ids = scenes[index].read()
            features = extractor.features(picture)
            for name, score in scorers.items():
                scores = score(features.flatten(1).T).T.unflatten(1, features.shape[1:])
                totals[name] += confusion(numbers[enlarged(scores, ids.shape)], ids)
            advance(1)
    shares = gather_objects(totals)
    return {name: sum(share[name] for share in shares) for name in scorers}


def enlarged(scores: Float[Tensor, "K h w"], size: Sequence[int]) -> Int[np.ndarray, "H W"]:
    """The index of the class with the highest score at each pixel."""
    large = F.interpolate(scores[None], tuple(size), mode="bilinear")[0]
    return large.argmax(dim=0).cpu().numpy()


def confusion(found: Ids, truth: Ids) -> Int[np.ndarray, "256 256"]:
    """Pixels by true (row) and found (column) class, without those whose truth is void."""
    valid = truth != VOID
    pairs = truth[valid].astype(np.int64) * 256 + found[valid]
    return np.bincount(pairs, minlength=256 * 256).reshape(256, 256)


def mean_iou(counts: Int[np.ndarray, "256 256"]) -> dict[str, Any]:
    """Mean over classes of intersection over union, each summed over all images first.

    Returns:
        In percent "miou", "accuracy" of pixels, and "classes": the index of each class that occurs
        in the truth or was found, the background included.
    """
    right, true, found = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    union = true + found - right
    classes = {str(k): 100 * float(right[k] / union[k]) for k in np.flatnonzero(union)}
    return {
        "miou": float(np.mean(list(classes.values()))),
        "accuracy": 100 * float(right.sum() / counts.sum()),
        "classes": classes,
    }
