"""The pictures of a report: nearest neighbours, attention and components, beside an untrained twin.

Every function takes the trained network and the untrained one of the same architecture, and
returns a section of HTML. Shapes: n images, D width, h w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

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
from dino.models.attention import attention_maps, mass_mask
from dino.models.backbone import Backbone
from dino.show.html import figure, picture
from dino.show.map_overlay import colored, overlay, whole_patches
from dino.show.patch_pca import components, patch_features

QUERIES, NEIGHBOURS, BANK = 6, 5, 600
"""How many images are asked, answered with, and searched (spread evenly over the data)."""

TILE = 128
"""Widest picture of a neighbour, in pixels."""

PHOTOGRAPHS, SIDE, CELLS = 4, 480, 60
"""How many photographs are mapped; their longer side in pixels, and in patches at most."""

SHOWN_FIRST = ("astronaut", "chelsea", "china", "coffee", "flower", "rocket")
"""Photographs of the demo with something to find in them."""

TRAINED, UNTRAINED = "trained", "untrained"
MEANING = {
    TRAINED: "trained: good if each thing has a colour of its own",
    UNTRAINED: "untrained, for comparison",
}
"""What stands under a picture of components."""


@dataclass(frozen=True)
class Pair:
    """The network of the run and one of the same architecture with fresh weights."""

    trained: Backbone
    untrained: Backbone

    def items(self) -> tuple[tuple[str, Backbone], tuple[str, Backbone]]:
        """Both with their names."""
        return (TRAINED, self.trained), (UNTRAINED, self.untrained)


# ------------------------------------------------------------------------------------ pictures
def photographs(
    data: str, val: str | None, pixels: PixelFormat = RGB
) -> tuple[list[tuple[str, Sample]], str]:
    """A few whole pictures with their names, and a sentence on whether they were trained on.

    Args:
        data: the images that were trained on.
        val: others, to be taken instead.
        pixels: channels and range of both.

    Raises:
        UserError: if the data are not there any more.
    """
    if data == "demo":
        from dino.data.sources.demo import photographs as demo_photographs

        named = demo_photographs()
        chosen = [name for name in SHOWN_FIRST if name in named][:PHOTOGRAPHS]
        seen = "Tiles of the left part of each photograph were trained on, the right part was not."
        return [(name, named[name]) for name in chosen], seen
    source = open_source(data if val is None else val, pixels)
    images = _usable(source, spread(len(source), PHOTOGRAPHS))
    names = [(source.path(index), image) for index, image in images.items()]
    return names, "These pictures were " + ("trained on." if val is None else "never trained on.")


def _some(items: Sequence[int], count: int) -> list[int]:
    return [items[i] for i in spread(len(items), count)]


def _usable(source: Source, indices: Sequence[int]) -> dict[int, Sample]:
    """Those of the images that can be read, by their index; the run has listed the others."""
    images = {}
    for index in indices:
        with suppress(ImageError):
            images[index] = source[index]
    return images


def _prepared(backbone: Backbone, sample: Sample) -> tuple[Image.Image, Tensor]:
    """A photograph as it is shown, cut to whole patches, and as the network takes it."""
    patch = backbone.patch_size or 1
    side = min(SIDE, CELLS * patch) if backbone.patch_size else SIDE
    pixels = as_pixels(sample)
    scale = side / max(pixels.shape[1:])
    size = [max(patch, round(length * scale)) for length in pixels.shape[1:]]
    pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    shown = whole_patches(as_picture(pixels), patch)
    pixels = pixels[:, : shown.height, : shown.width]
    device = next(backbone.parameters()).device
    transform = backbone.preprocessing
    return shown, normalize(pixels, transform.mean, transform.std).to(device)


# ---------------------------------------------------------------------------------- neighbours
def neighbours(pair: Pair, data: str, val: str | None) -> str:
    """Images and those most similar to them by the features of either network.

    Args:
        pair: the networks.
        data: the images that were trained on; neighbours are searched here.
        val: images to ask for; None takes them from `data` too.

    Raises:
        UserError: if the data are not there any more.
    """
    pixels = pair.trained.preprocessing.pixels
    bank = open_source(data, pixels)
    asked = bank if val is None else open_source(val, pixels)
    among = spread(len(bank), BANK)
    searched = _usable(bank, among)
    among, pool = list(searched), list(searched.values())
    answers = _usable(asked, _some(among, QUERIES) if val is None else spread(len(asked), QUERIES))
    queries, shown = list(answers), list(answers.values())
    if len(among) < 2 or not queries:
        return ""
    groups: list[list[str]] = [[] for _ in queries]
    features = _embedded(pair, [*shown, *pool])
    for name, rows in features.items():
        similarity = rows[: len(shown)] @ rows[len(shown) :].T
        if val is None:  # nothing is its own neighbour
            own = torch.tensor([[i == query for i in among] for query in queries])
            similarity[own] = -torch.inf
        best = similarity.topk(min(NEIGHBOURS, len(among) - 1), dim=1)
        for query, group, values, indices in zip(
            queries, groups, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            wanted = _label(asked, query)
            found = [
                _neighbour(pool[i], _label(bank, among[i]), wanted, value)
                for value, i in zip(values, indices, strict=True)
            ]
            group.append(f'<div class="found"><div class="name">{name}</div>{"".join(found)}</div>')
    blocks = [
        f'<div class="query">{_asked(image, _label(asked, query))}{"".join(group)}</div>'
        for image, query, group in zip(shown, queries, groups, strict=True)
    ]
    what = "images it was trained on" if val is None else "images never seen in training"
    framed = " Solid green frame: same class; dashed frame: another." if asked.labels else ""
    intro = (
        f"On the left {len(queries)} {what}, evenly spread over all and not chosen by hand. Beside "
        f"each, of {len(among)} training images, those with the most similar features, nearest "
        "first, with the cosine similarity: by the trained network, then by the untrained one."
        f"{framed} Good: the trained network's neighbours show the same thing and not only the "
        "same colours."
    )
    return f"<h2>Nearest neighbours</h2><p>{intro}</p>{''.join(blocks)}"


@torch.inference_mode()
def _embedded(pair: Pair, images: Sequence[Sample]) -> dict[str, Float[Tensor, "n D"]]:
    """Features of length 1 by either network; each image is prepared once."""
    device = next(pair.trained.parameters()).device
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in pair.items()}
    for start in range(0, len(images), 64):
        part = [pair.trained.preprocess(image) for image in images[start : start + 64]]
        batch = torch.stack(part).to(device)
        for name, network in pair.items():
            rows[name].append(network(batch).float().cpu())
    return {name: F.normalize(torch.cat(parts), dim=1) for name, parts in rows.items()}


def _label(source: Source, index: int) -> str:
    if source.labels is None:
        return ""
    label = source.labels[index]
    return source.classes[label] if source.classes else f"class {label}"


def _asked(sample: Sample, name: str) -> str:
    shown = picture(as_picture(sample), f"asked: {name}", width=TILE)
    tile = figure(shown, name or "asked", "asked")
    return f'<div><div class="name">asked</div>{tile}</div>'


def _neighbour(sample: Sample, name: str, wanted: str, similarity: float) -> str:
    css = "" if not wanted else "same" if name == wanted else "apart"
    tile = picture(as_picture(sample), f"neighbour: {name}", width=TILE)
    return figure(tile, f"{name} {similarity:.2f}".strip(), css)


# ----------------------------------------------------------------------------------- attention
def attention(pair: Pair, photos: Sequence[tuple[str, Sample]], origin: str) -> str:
    """Where the CLS token of the last block looks; nothing for networks without one.

    Args:
        pair: the networks.
        photos: pictures with names.
        origin: a sentence on where they come from.
    """
    if pair.trained.patch_size is None:
        return ""
    blocks = []
    for name, photo in photos:
        shown, pixels = _prepared(pair.trained, photo)
        maps = {kind: attention_maps(net, pixels[None])[0].cpu() for kind, net in pair.items()}
        mean = maps[TRAINED].mean(dim=0)
        pictures = [
            figure(picture(shown, name), name),
            figure(
                picture(overlay(shown, mean), f"attention on {name}"),
                "trained, mean of the heads: bright is where the network looks",
            ),
            figure(
                picture(_cut_out(shown, mean), f"60 % of the attention on {name}"),
                "trained: the patches that hold 60 % of the attention",
            ),
            figure(
                picture(overlay(shown, maps[UNTRAINED].mean(dim=0)), f"untrained, {name}"),
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
        "How strongly the CLS token, the one vector that stands for the whole picture, attends to "
        "each patch in the last block. Nobody told the network what an object is. Good: attention "
        "gathers on things and lets the background go, heads differ from one another, and the "
        f"untrained network shows nothing of the kind. {origin}"
    )
    return f"<h2>Attention</h2><p>{intro}</p>{''.join(blocks)}"


def _head(values: Float[Tensor, "h w"], index: int, name: str) -> str:
    small = colored(values, (values.shape[1], values.shape[0]), "viridis")
    return picture(small, f"head {index} on {name}", exact=True)


def _cut_out(image: Image.Image, values: Float[Tensor, "h w"]) -> Image.Image:
    """The picture where the mask of 60 % of the mass is, dim and grey elsewhere."""
    mask = mass_mask(values).numpy().astype(np.uint8) * 255
    dim = ImageEnhance.Brightness(image.convert("L").convert("RGB")).enhance(0.3)
    stencil = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, dim, stencil)


# ---------------------------------------------------------------------------------- components
def component_maps(pair: Pair, photos: Sequence[tuple[str, Sample]]) -> str:
    """The first three principal components of the patch tokens as colours."""
    prepared = [_prepared(pair.trained, photo) for _, photo in photos]
    maps = {
        kind: components(patch_features(network, [pixels for _, pixels in prepared]))
        for kind, network in pair.items()
    }
    blocks = []
    for index, (name, _) in enumerate(photos):
        figures = [figure(picture(prepared[index][0], name), name)]
        for kind, pictures in maps.items():
            small = Image.fromarray(pictures[index])
            figures.append(figure(picture(small, f"{kind}, {name}", exact=True), MEANING[kind]))
        blocks.append(f'<div class="block pictures w3">{"".join(figures)}</div>')
    intro = (
        "Each patch has a feature of its own. Its three strongest directions of variation, found "
        "over all pictures below at once, are shown as red, green and blue, so equal colours mean "
        "similar features, also from one picture to the next. Good: parts of one thing share a "
        "colour and edges follow its outline. An untrained network mostly repeats the brightness "
        "and colour of the pixels."
    )
    return f"<h2>Components of the patch features</h2><p>{intro}</p>{''.join(blocks)}"
