"""Objects found by attention: Jaccard index of masks of the mass (section 4.2.2, Fig. 4, App. D).

The CLS token's attention of each head gives a mask, the patches that hold most of its mass. The
score is that of the best mask, chosen with the ground truth: an upper bound, also for an untrained
network.

Shapes: O objects, M masks (one a head, and one of the mean over heads), h w patches, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dino.data.images.masks import Ids, objects_in
from dino.evaluate.segmentation.datasets import Scene
from dino.features.patch_classifiers import PatchExtractor, patch_counts
from dino.features.table import my_share
from dino.files import UserError
from dino.models.attention import mass_mask
from dino.progress import bar
from dino.runtime import gather_objects, ranks


def object_jaccards(masks: Bool[Tensor, "M h w"], ids: Ids) -> Float[Tensor, "O M"]:
    """Intersection over union of each object with each mask, enlarged by nearest neighbours.

    Void pixels count for nothing. Objects are in the order of their numbers.
    """
    grid = (masks.shape[1], masks.shape[2])
    counts = patch_counts(ids, grid, objects_in(ids)).flatten(1).double()
    inside = masks.flatten(1).double().cpu()
    both = counts[:-1] @ inside.T
    union = counts[:-1].sum(dim=1)[:, None] + inside @ counts.sum(dim=0) - both
    return both / union


def attention_jaccard(
    extractor: PatchExtractor, scenes: Sequence[Scene], masses: Sequence[float], title: str
) -> dict[str, Any]:
    """Jaccard indices of a network's attention masks over images, in percent.

    Images without any object are left out, and counted.

    Args:
        extractor: of a network with attention.
        scenes: the images, divided among the ranks.
        masses: shares of the attention that masks hold, each in (0, 1).
        title: of the progress bar.

    Returns:
        Under "masses" the numbers of `summary` by mass; under "whole_image" the Jaccard index of
        the mask that covers the image, which needs no network; the numbers of "images" and
        "objects" that count, and of "empty" images.

    Raises:
        UserError: for networks without attention, or if no image holds an object.
    """
    found: list[list[Float[Tensor, "O M"]]] = []
    full: Bool[Tensor, "1 1 1"] = torch.ones(1, 1, 1, dtype=torch.bool)
    mine = my_share(range(len(scenes)))
    with bar(f"{title}, images", len(mine), shown=ranks().main) as advance:
        for index in mine:
            picture, ids = scenes[index].read()
            maps = extractor.attention(picture)
            maps = torch.cat([maps, maps.mean(dim=0, keepdim=True)])
            masks = [*(mass_mask(maps, mass) for mass in masses), full]
            found.append([object_jaccards(mask, ids) for mask in masks])
            advance(1)
    per_image = [one for share in gather_objects(found) for one in share if len(one[0])]
    if not per_image:
        raise UserError(f"none of the masks, such as {scenes[0].mask}, holds an object")
    *per_mass, covers = zip(*per_image, strict=True)
    return {
        "masses": {f"{m:g}": summary(one) for m, one in zip(masses, per_mass, strict=True)},
        "whole_image": 100 * float(torch.stack([one.mean() for one in covers]).mean()),
        "images": len(per_image),
        "objects": sum(map(len, covers)),
        "empty": len(scenes) - len(per_image),
    }


def summary(jaccards: Sequence[Float[Tensor, "_ M"]]) -> dict[str, Any]:
    """Means over the objects of an image, then over images, in percent, for each way to choose.

    Returns:
        "best_per_object": the best head of each object, as in the author's code; "best_per_image":
        the head with the best mean of an image, as in the caption of Fig. 4; "mean_map": the
        mask of the mean of all heads, which needs no choice; "heads": each head alone.
    """
    heads = [one[:, :-1] for one in jaccards]
    chosen = {
        "best_per_object": [one.amax(dim=1).mean() for one in heads],
        "best_per_image": [one.mean(dim=0).amax() for one in heads],
        "mean_map": [one[:, -1].mean() for one in jaccards],
        "heads": [one.mean(dim=0) for one in heads],
    }
    return {name: (100 * torch.stack(of).mean(dim=0)).tolist() for name, of in chosen.items()}
