"""The images of a report: nearest neighbours, attention and components, beside an untrained twin.

Every function takes the trained network and the untrained one of the same architecture, and
returns a section of HTML. Shapes: n images, D width, h w patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageEnhance
from torch import Tensor

from dino.data.images.decode import Sample, as_picture, as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.sampler import spread
from dino.data.sources.open import Source, open_source
from dino.data.views.photometric import normalize
from dino.files import UserError
from dino.models.attention import attention_maps, mass_mask
from dino.models.backbone import Backbone
from dino.show.html import figure, picture
from dino.show.map_overlay import colored, crop_to_patches, overlay
from dino.show.patch_pca import components, patch_features

QUERIES, NEIGHBOURS, BANK = 6, 5, 600
"""Numbers of queries, of neighbours of each, and of searched images (evenly spread)."""

TILE = 128
"""Largest width of a neighbour's image, in pixels."""

PHOTOGRAPHS, SIDE, CELLS = 4, 480, 60
"""Number of photographs with maps; their longer side in pixels, and at most in patches."""

SHOWN_FIRST = ("astronaut", "chelsea", "china", "coffee", "flower", "rocket")
"""Photographs of the demo that show objects."""

TRAINED, UNTRAINED = "trained", "untrained"
MEANING = {
    TRAINED: "trained: good if each thing has a colour of its own",
    UNTRAINED: "untrained, for comparison",
}
"""Captions of the components."""


class Pair(NamedTuple):
    """The network of the run and one of the same architecture with fresh weights."""

    trained: Backbone
    untrained: Backbone

    def features(
        self, compute: Callable[[Backbone], Sequence[Tensor]]
    ) -> dict[str, Sequence[Tensor]]:
        """What both networks compute, by their names.

        Raises:
            UserError: if it is not finite.
        """
        found = {TRAINED: compute(self.trained), UNTRAINED: compute(self.untrained)}
        if not all(part.isfinite().all() for parts in found.values() for part in parts):
            raise UserError("the features hold NaN or infinity: the network has diverged")
        return found


# ------------------------------------------------------------------------------------ pictures
def photographs(
    data: str, val: str | None, pixels: PixelFormat = RGB
) -> tuple[list[tuple[str, Sample]], str]:
    """A few photographs with their names, and a sentence on whether they were trained on.

    Args:
        data: the images that were trained on.
        val: others, to be taken instead.
        pixels: channels and range of both.

    Raises:
        UserError: if the data do not exist any more.
    """
    if data == "demo":
        from dino.data.sources.demo import photographs as demo_photographs

        named = demo_photographs()
        chosen = [name for name in SHOWN_FIRST if name in named][:PHOTOGRAPHS]
        origin = (
            "Tiles of the left part of each photograph were trained on, the right part was not."
        )
        return [(name, named[name]) for name in chosen], origin
    source = open_source(data if val is None else val, pixels)
    images = _usable(source, spread(len(source), PHOTOGRAPHS))
    names = [(source.path(index), image) for index, image in images.items()]
    return names, "These images were " + ("trained on." if val is None else "not trained on.")


def _usable(source: Source, indices: Sequence[int]) -> dict[int, Sample]:
    """The readable ones among the images, by index; the run has listed the others."""
    images = {}
    for index in indices:
        with suppress(ImageError):
            images[index] = source[index]
    return images


def _prepared(backbone: Backbone, sample: Sample) -> tuple[Image.Image, Tensor]:
    """A photograph cropped to complete patches, as an image and as the network's input."""
    patch = backbone.patch_size or 1
    side = min(SIDE, CELLS * patch) if backbone.patch_size else SIDE
    pixels = as_pixels(sample)
    scale = side / max(pixels.shape[1:])
    size = [max(patch, round(length * scale)) for length in pixels.shape[1:]]
    pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    shown = crop_to_patches(as_picture(pixels), patch)
    pixels = pixels[:, : shown.height, : shown.width]
    device = next(backbone.parameters()).device
    transform = backbone.preprocessing
    return shown, normalize(pixels, transform.mean, transform.std).to(device)


# ---------------------------------------------------------------------------------- neighbours
def neighbours(pair: Pair, data: str, val: str | None) -> str:
    """Images and those most similar to them in the features of either network.

    Args:
        pair: the networks.
        data: the images that were trained on; neighbours are searched here.
        val: the queries; None takes them from `data` too.

    Raises:
        UserError: if the data do not exist any more.
    """
    pixels = pair.trained.preprocessing.pixels
    bank = open_source(data, pixels)
    source = bank if val is None else open_source(val, pixels)
    searched = _usable(bank, spread(len(bank), BANK))
    indices = list(searched)
    chosen = [indices[i] for i in spread(len(indices), QUERIES)]
    queries = _usable(source, chosen if val is None else spread(len(source), QUERIES))
    if len(indices) < 2 or not queries:
        return ""
    groups: list[list[str]] = [[] for _ in queries]
    images = [*queries.values(), *searched.values()]
    for name, (rows,) in pair.features(lambda network: [_embedded(network, images)]).items():
        similarity = rows[: len(queries)] @ rows[len(queries) :].T
        if val is None:  # no image is its own neighbour
            same = torch.tensor([[i == query for i in indices] for query in queries])
            similarity[same] = -torch.inf
        values, places = similarity.topk(min(NEIGHBOURS, len(indices) - 1), dim=1)
        for row, (query, group) in enumerate(zip(queries, groups, strict=True)):
            found = (
                _neighbour(bank, searched, indices[i], _label(source, query), value)
                for value, i in zip(values[row].tolist(), places[row].tolist(), strict=True)
            )
            group.append(f'<div class="found"><div class="name">{name}</div>{"".join(found)}</div>')
    blocks = [
        f'<div class="query">{_query(image, _label(source, query))}{"".join(group)}</div>'
        for (query, image), group in zip(queries.items(), groups, strict=True)
    ]
    what = "training images" if val is None else "images that were not trained on"
    framed = " Solid green frame: same class; dashed frame: another." if source.labels else ""
    intro = (
        f"On the left {len(queries)} {what}, evenly spread over all and not chosen by hand. Beside "
        f"each, of {len(indices)} training images, those with the most similar features, nearest "
        "first, with the cosine similarity: by the trained network, then by the untrained one."
        f"{framed} Good: the trained network's neighbours show the same thing, not only the same "
        "colours."
    )
    return f"<h2>Nearest neighbours</h2><p>{intro}</p>{''.join(blocks)}"


@torch.inference_mode()
def _embedded(network: Backbone, images: Sequence[Sample]) -> Float[Tensor, "n D"]:
    """Features of length 1."""
    device, rows = next(network.parameters()).device, []
    for start in range(0, len(images), 64):
        batch = torch.stack([network.preprocess(image) for image in images[start : start + 64]])
        rows.append(network(batch.to(device)).float().cpu())
    return F.normalize(torch.cat(rows), dim=1)


def _label(source: Source, index: int) -> str:
    if source.labels is None:
        return ""
    label = source.labels[index]
    return source.classes[label] if source.classes else f"class {label}"


def _query(sample: Sample, name: str) -> str:
    shown = picture(as_picture(sample), f"query: {name}", width=TILE)
    tile = figure(shown, name or "query", "asked")
    return f'<div><div class="name">query</div>{tile}</div>'


def _neighbour(
    bank: Source, images: dict[int, Sample], index: int, expected: str, similarity: float
) -> str:
    name = _label(bank, index)
    css = "" if not expected else "same" if name == expected else "apart"
    tile = picture(as_picture(images[index]), f"neighbour: {name}", width=TILE)
    return figure(tile, f"{name} {similarity:.2f}".strip(), css)


# ----------------------------------------------------------------------------------- attention
def attention(pair: Pair, photos: Sequence[tuple[str, Sample]], origin: str) -> str:
    """The attention of the last block's CLS token; empty for networks without one.

    Args:
        pair: the networks.
        photos: images with names.
        origin: a sentence on where they come from.
    """
    if pair.trained.patch_size is None:
        return ""
    blocks = []
    for name, photo in photos:
        shown, pixels = _prepared(pair.trained, photo)
        maps = pair.features(lambda network: [*attention_maps(network, pixels[None])[0].cpu()])  # noqa: B023
        means = {kind: torch.stack([*heads]).mean(dim=0) for kind, heads in maps.items()}
        pictures = [
            figure(picture(shown, name), name),
            figure(
                picture(overlay(shown, means[TRAINED]), f"attention on {name}"),
                "trained, mean of the heads: bright patches have the most attention",
            ),
            figure(
                picture(_cut_out(shown, means[TRAINED]), f"60 % of the attention on {name}"),
                "trained: the patches that hold 60 % of the attention",
            ),
            figure(
                picture(overlay(shown, means[UNTRAINED]), f"untrained, {name}"),
                "untrained, mean of the heads, for comparison",
            ),
        ]
        heads = [_head(values, index, name) for index, values in enumerate(maps[TRAINED], start=1)]
        strip = figure(
            f'<div class="pictures heads">{"".join(heads)}</div>',
            f"trained, each of the {len(heads)} heads alone (dark: little, yellow: much)",
        )
        row = f'<div class="pictures w4">{"".join(pictures)}</div>'
        blocks.append(f'<div class="block">{row}{strip}</div>')
    intro = (
        "The attention of the CLS token, the vector that represents the image, to each patch in "
        "the last block. The network was trained without labels or masks. Good: attention "
        "concentrates on objects and not on the background, heads differ from one another, and the "
        f"untrained network shows neither. {origin}"
    )
    return f"<h2>Attention</h2><p>{intro}</p>{''.join(blocks)}"


def _head(values: Float[Tensor, "h w"], index: int, name: str) -> str:
    small = colored(values, (values.shape[1], values.shape[0]), "viridis")
    return picture(small, f"head {index} on {name}", exact=True)


def _cut_out(image: Image.Image, values: Float[Tensor, "h w"]) -> Image.Image:
    """The image within the mask of 60 % of the mass, dim and grey elsewhere."""
    mask = mass_mask(values).numpy().astype(np.uint8) * 255
    dim = ImageEnhance.Brightness(image.convert("L").convert("RGB")).enhance(0.3)
    stencil = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, dim, stencil)


# ---------------------------------------------------------------------------------- components
def component_maps(pair: Pair, photos: Sequence[tuple[str, Sample]]) -> str:
    """The first three principal components of the patch tokens as colours."""
    prepared = [_prepared(pair.trained, photo) for _, photo in photos]
    pixels = [pixels for _, pixels in prepared]
    patches = pair.features(lambda network: patch_features(network, pixels))
    maps = {kind: components(tokens) for kind, tokens in patches.items()}
    blocks = []
    for index, (name, _) in enumerate(photos):
        figures = [figure(picture(prepared[index][0], name), name)]
        for kind, pictures in maps.items():
            small = Image.fromarray(pictures[index])
            figures.append(figure(picture(small, f"{kind}, {name}", exact=True), MEANING[kind]))
        blocks.append(f'<div class="block pictures w3">{"".join(figures)}</div>')
    intro = (
        "The first three principal components of the patch features, of all images below together, "
        "are shown as red, green and blue, so equal colours mean similar features, also between "
        "images. Good: parts of one object share a colour and edges follow its outline. An "
        "untrained network mostly repeats the brightness and colour of the pixels."
    )
    return f"<h2>Components of the patch features</h2><p>{intro}</p>{''.join(blocks)}"
