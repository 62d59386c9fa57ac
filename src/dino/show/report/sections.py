"""The images of a report: nearest neighbours, attention and components.

Every function takes the trained network and an untrained one of the same architecture, and returns
a section of HTML. Shapes: n images, D embed_dim, h w patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dino.data.images.decode import Sample, as_picture, as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.images.map_overlay import colored, cut_out, overlay
from dino.data.images.pixel_format import RGB, PixelFormat
from dino.data.sampler import spread
from dino.data.sources.open import Source, open_source
from dino.data.views.photometric import normalize
from dino.files import UserError
from dino.models.attention import attention_maps, mass_mask
from dino.models.backbone import Backbone
from dino.show.html import figure, picture
from dino.show.patch_pca import components

QUERIES, NEIGHBOURS, BANK = 6, 5, 600
"""Numbers of queries, of neighbours of each, and of searched images (evenly spread)."""

TILE = 128
"""Largest width of a neighbour's image, in pixels."""

PHOTOGRAPHS, SIDE, CELLS = 4, 480, 60
"""Number of photographs with maps; their longer side in pixels, and at most in patches."""

OBJECTS = ("astronaut", "chelsea", "china", "coffee")
"""Photographs of the demo that show objects."""

TRAINED, UNTRAINED = "trained", "untrained"
COMPONENT_CAPTIONS = (
    "trained: good if each object has another colour",
    "untrained, for comparison",
)


class Pair(NamedTuple):
    """The network of the run and one of the same architecture with fresh weights."""

    trained: Backbone
    untrained: Backbone

    @torch.inference_mode()
    def features(
        self, compute: Callable[[Backbone], Sequence[Tensor]]
    ) -> dict[str, Sequence[Tensor]]:
        """What `compute` returns for both networks, by their names.

        Raises:
            UserError: if it is not finite.
        """
        features = {TRAINED: compute(self.trained), UNTRAINED: compute(self.untrained)}
        if not all(tensor.isfinite().all() for group in features.values() for tensor in group):
            raise UserError("the features hold NaN or infinity: the network has diverged")
        return features


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
        origin = "The left of each photograph was trained on, in tiles; the right part was not."
        return [(name, named[name]) for name in OBJECTS], origin
    source = open_source(data if val is None else val, pixels)
    images = _usable(source, spread(len(source), PHOTOGRAPHS))
    folder = data if val is None else val
    names = [(_name(source, index, folder), image) for index, image in images.items()]
    return names, "These images were " + ("trained on." if val is None else "not trained on.")


def _usable(
    source: Source, indices: Sequence[int], keep: Callable[[Sample], Any] = lambda sample: sample
) -> dict[int, Any]:
    """What is kept of the readable images, by index; the run has listed the others."""
    images = {}
    for index in indices:
        with suppress(ImageError):
            images[index] = keep(source[index])
    return images


def _prepared(backbone: Backbone, sample: Sample) -> tuple[Image.Image, Tensor]:
    """A photograph cropped to complete patches, as an image and as the network's input."""
    patch = backbone.patch_size or 1
    side = min(SIDE, CELLS * patch) if backbone.patch_size else SIDE
    pixels = as_pixels(sample)
    scale = side / max(pixels.shape[1:])
    size = [max(patch, round(length * scale)) for length in pixels.shape[1:]]
    pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    pixels = pixels[:, : size[0] // patch * patch, : size[1] // patch * patch]
    device, transform = next(backbone.parameters()).device, backbone.preprocessing
    return as_picture(pixels), normalize(pixels, transform.mean, transform.std).to(device)


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

    def keep(sample: Sample) -> tuple[Image.Image, Tensor]:
        """A thumbnail and the network's input: hundreds of photographs would fill the memory."""
        tile = as_picture(sample)
        height = max(1, round(tile.height * TILE / tile.width))
        tile = tile.resize((TILE, height)) if tile.width > TILE else tile
        return tile, pair.trained.preprocess(sample)

    searched = _usable(bank, spread(len(bank), BANK), keep)
    indices = list(searched)
    chosen = [indices[i] for i in spread(len(indices), QUERIES)]
    queries = _usable(source, chosen if val is None else spread(len(source), QUERIES), keep)
    if len(indices) < 2 or not queries:
        return ""
    inputs, nearest = [kept for _, kept in (*queries.values(), *searched.values())], {}
    for name, (rows,) in pair.features(lambda network: [_embedded(network, inputs)]).items():
        similarity = rows[: len(queries)] @ rows[len(queries) :].T
        if val is None:  # an image is not a neighbour of itself
            same = torch.tensor([[i == query for i in indices] for query in queries])
            similarity[same] = -torch.inf
        nearest[name] = similarity.topk(min(NEIGHBOURS, len(indices) - 1), dim=1)
    blocks = []
    for row, (query, (image, _)) in enumerate(queries.items()):
        label = source.class_name(query)
        tile = _tile("query", image, _name(source, query, val or data), "query-image")
        groups = [f'<div><div class="name">query</div>{tile}</div>']
        for name, (values, places) in nearest.items():
            tiles = [f'<div class="name">{name}</div>']
            for value, place in zip(values[row].tolist(), places[row].tolist(), strict=True):
                other = bank.class_name(indices[place])
                frame = "" if not (label and other) else "same" if other == label else "apart"
                caption = f"{value:.2f} {_name(bank, indices[place], data)}"
                tiles.append(_tile("neighbour", searched[indices[place]][0], caption, frame))
            groups.append(f'<div class="neighbours">{"".join(tiles)}</div>')
        blocks.append(f'<div class="query">{"".join(groups)}</div>')
    what = "training images" if val is None else "images that were not trained on"
    frames = " Solid green frame: same class; dashed frame: another." if source.labels else ""
    intro = (
        f"Left: {len(queries)} {what}, evenly spread over all and not chosen by hand. Beside each, "
        f"of {len(indices)} training images, those with the most similar features, nearest first, "
        "with the cosine similarity: by the trained network, then by the untrained one."
        f"{frames} Good: the trained network's neighbours show the same object, not only the same "
        "colours."
    )
    return f"<h2>Nearest neighbours</h2><p>{intro}</p>{''.join(blocks)}"


def _embedded(network: Backbone, inputs: Sequence[Tensor]) -> Float[Tensor, "n D"]:
    """Features of length 1."""
    device, rows = next(network.parameters()).device, []
    for start in range(0, len(inputs), 64):
        batch = torch.stack(list(inputs[start : start + 64]))
        rows.append(network(batch.to(device)).float().cpu())
    return F.normalize(torch.cat(rows), dim=1)


def _name(source: Source, index: int, data: str) -> str:
    """An image's name without the folder of all images, and its class unless that is in it."""
    path, label = source.path(index), source.class_name(index)
    folder = data if path.startswith(data) else data.partition(":")[0]  # demo of demo:test
    name = path.removeprefix(folder).lstrip("/\\:") or path
    return name if not label or label in name.split("/") else f"{name} ({label})"


def _tile(what: str, image: Image.Image, caption: str, css: str) -> str:
    return figure(picture(image, f"{what}: {caption}", width=TILE), caption, css)


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
        image, pixels = _prepared(pair.trained, photo)
        maps = pair.features(lambda network: [*attention_maps(network, pixels[None])[0].cpu()])  # noqa: B023
        trained, untrained = (torch.stack([*heads]).mean(dim=0) for heads in maps.values())
        columns = {
            name: image,
            "trained, mean of the heads: bright patches have the most attention": overlay(
                image, trained
            ),
            "trained: the patches that hold 60 % of the attention": cut_out(
                image, mass_mask(trained)
            ),
            "untrained, mean of the heads, for comparison": overlay(image, untrained),
        }
        row = "".join(figure(picture(p, f"{name}: {text}"), text) for text, p in columns.items())
        heads = [
            picture(colored(values, "viridis"), f"{name}: head {head}", exact=True)
            for head, values in enumerate(maps[TRAINED], start=1)
        ]
        strip = figure(
            f'<div class="heads">{"".join(heads)}</div>',
            f"trained, each of the {len(heads)} heads alone (dark: little, yellow: much)",
        )
        blocks.append(f'<div class="block"><div class="pictures">{row}</div>{strip}</div>')
    intro = (
        "The attention of the CLS token, the vector that represents the image, to each patch in "
        "the last block. The network was trained without labels or masks. Good: attention "
        "concentrates on objects and not on the background, heads differ from one another, and the "
        f"untrained network shows neither. {origin}"
    )
    return f"<h2>Attention</h2><p>{intro}</p>{''.join(blocks)}"


# ---------------------------------------------------------------------------------- components
def component_maps(pair: Pair, photos: Sequence[tuple[str, Sample]]) -> str:
    """The first three principal components of the patch tokens as colours."""
    prepared = [_prepared(pair.trained, photo) for _, photo in photos]
    tokens = pair.features(
        lambda network: [network.features(pixels[None]).patches[0, 0] for _, pixels in prepared]
    )
    trained, untrained = (components(patches) for patches in tokens.values())
    blocks = []
    for (name, _), (image, _), *maps in zip(photos, prepared, trained, untrained, strict=True):
        figures = [figure(picture(image, name), name)]
        for pixels, caption in zip(maps, COMPONENT_CAPTIONS, strict=True):
            small = picture(Image.fromarray(pixels), f"{name}: {caption}", exact=True)
            figures.append(figure(small, caption))
        blocks.append(f'<div class="block pictures">{"".join(figures)}</div>')
    intro = (
        "The first three principal components of the patch features, of all images below together, "
        "are shown as red, green and blue, so equal colours mean similar features, also between "
        "images. Good: an object has one colour, with edges at its outline. An "
        "untrained network mostly repeats the brightness and colour of the pixels."
    )
    return f"<h2>Components of the patch features</h2><p>{intro}</p>{''.join(blocks)}"
