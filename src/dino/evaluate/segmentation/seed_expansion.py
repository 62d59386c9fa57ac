"""An object by expansion of a seed patch (LOST, arXiv 2109.14279, section 3).

Shapes: D width, h w patches.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from dino.evaluate.segmentation.discovered import Discovered, connected_to


def seed_expansion(features: Float[Tensor, "D h w"], k: int = 100) -> Discovered:
    """The object around the patch that is similar to the fewest others.

    Two patches are similar if their product is not negative. The seed is the patch with the fewest
    similar ones, the first of equals. It is joined by those that are similar to it among the `k`
    patches with the fewest, and the object is every patch whose products with all of these have a
    sum that is not negative, as far as it is connected with the seed. The saliency is this sum,
    over its maximum.

    Args:
        features: of the patches, such as keys, which point in all directions: not those of which
            all products are positive.
        k: of the paper, which takes 100.
    """
    grid = features.shape[1:]
    rows = features.flatten(1).double().cpu().numpy()
    products = rows.T @ rows
    similar = products >= 0
    fewest = similar.sum(axis=1).argsort(kind="stable")[:k]
    seed = int(fewest[0])
    sums = products[fewest[similar[seed, fewest]]].sum(axis=0).reshape(grid)
    mask = connected_to(seed, sums >= 0)
    return Discovered(mask, sums.clip(0) / max(sums.max(), 1e-12))
