"""Nearest neighbours of test images in the features of several networks.

Shapes: n images, D embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dino.data.images.decode import Sample, as_picture
from dino.data.sampler import spread
from dino.data.sources.open import open_source
from dino.models.backbone import Backbone
from dino.show.html import figure, picture
from dino.show.report.photographs import Networks, computed, image_name, usable

QUERIES, NEIGHBOURS, BANK = 6, 5, 600
"""Numbers of queries, of neighbours of each, and of searched images (evenly spread)."""

TILE = 128
"""Largest width of a neighbour's image, in pixels."""


def neighbours(networks: Networks, data: str, val: str | None) -> str:
    """A section with images and those most similar to them in the features of each network.

    Args:
        networks: which take images of the same channels and range.
        data: the images that were trained on; neighbours are searched here.
        val: the queries; None takes them from `data` too.

    Returns:
        HTML; empty with fewer than two images.

    Raises:
        UserError: if the data do not exist any more.
    """
    first = next(iter(networks.values()))
    bank = open_source(data, first.preprocessing.pixels)
    source = bank if val is None else open_source(val, first.preprocessing.pixels)
    transforms = list(dict.fromkeys(network.preprocessing for network in networks.values()))

    def keep(sample: Sample) -> tuple[Image.Image, list[Tensor]]:
        """A thumbnail and the networks' inputs: photographs would fill the memory."""
        tile = as_picture(sample)
        height = max(1, round(tile.height * TILE / tile.width))
        tile = tile.resize((TILE, height)) if tile.width > TILE else tile
        return tile, [transform(sample) for transform in transforms]

    searched = usable(bank, spread(len(bank), BANK), keep)
    indices = list(searched)
    chosen = [indices[i] for i in spread(len(indices), QUERIES)]
    queries = usable(source, chosen if val is None else spread(len(source), QUERIES), keep)
    if len(indices) < 2 or not queries:
        return ""
    inputs, nearest = [kept for _, kept in (*queries.values(), *searched.values())], {}

    def embedded(network: Backbone) -> list[Float[Tensor, "n D"]]:
        place = transforms.index(network.preprocessing)
        return [_embedded(network, [by_transform[place] for by_transform in inputs])]

    for name, (rows,) in computed(networks, embedded).items():
        similarity = rows[: len(queries)] @ rows[len(queries) :].T
        if val is None:  # an image is not a neighbour of itself
            same = torch.tensor([[i == query for i in indices] for query in queries])
            similarity[same] = -torch.inf
        nearest[name] = similarity.topk(min(NEIGHBOURS, len(indices) - 1), dim=1)
    blocks = []
    for row, (query, (image, _)) in enumerate(queries.items()):
        label = source.class_name(query)
        tile = _tile("query", image, image_name(source, query, val or data), "query-image")
        groups = [f'<div><div class="name">query</div>{tile}</div>']
        for name, (values, places) in nearest.items():
            tiles = [f'<div class="name">{escape(name)}</div>']
            for value, place in zip(values[row].tolist(), places[row].tolist(), strict=True):
                other = bank.class_name(indices[place])
                frame = "" if not (label and other) else "same" if other == label else "apart"
                caption = f"{value:.2f} {image_name(bank, indices[place], data)}"
                said = {"same": ", same class", "apart": ", another class"}.get(frame, "")
                what = f"neighbour, {name}{said}"
                tiles.append(_tile(what, searched[indices[place]][0], caption, frame))
            groups.append(f'<div class="neighbours">{"".join(tiles)}</div>')
        blocks.append(f'<div class="query">{groups[0]}<div>{"".join(groups[1:])}</div></div>')
    what = "training images" if val is None else "images that were not trained on"
    frames = " Solid green frame: same class; dashed frame: another." if source.labels else ""
    intro = (
        f"Left: {len(queries)} {what}, evenly spread over all and not chosen by hand. Beside each, "
        f"of {len(indices)} training images, those with the most similar features, nearest first, "
        f"with the cosine similarity: {', then '.join(networks)}.{frames} Good: the neighbours "
        "show the same object, not only the same colours."
    )
    return f"<h2>Nearest neighbours</h2><p>{escape(intro)}</p>{''.join(blocks)}"


def _embedded(network: Backbone, inputs: Sequence[Tensor]) -> Float[Tensor, "n D"]:
    """Features of length 1."""
    device, rows = next(network.parameters()).device, []
    for start in range(0, len(inputs), 64):
        batch = torch.stack(list(inputs[start : start + 64]))
        rows.append(network(batch.to(device)).float().cpu())
    return F.normalize(torch.cat(rows), dim=1)


def _tile(what: str, image: Image.Image, caption: str, css: str) -> str:
    return figure(picture(image, f"{what}: {caption}", width=TILE), caption, css)
