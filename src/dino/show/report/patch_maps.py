"""Attention and components of patch features in the photographs of a report.

Shapes: h w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dino.data.images.map_overlay import colored, cut_out, overlay
from dino.models.attention import attention_maps, mass_mask
from dino.models.backbone import Backbone
from dino.show.html import color_bar, figure, gradient, legend, picture
from dino.show.patch_pca import color_ends, components
from dino.show.report.photographs import Networks, Photograph, computed

ATTENTION_LEGEND = legend(color_bar("inferno", "least attention", "most, in each picture"))
HEAD_LEGEND = legend(color_bar("viridis", "a head alone: least", "most"))
COMPONENT_LEGEND = legend(
    *(f"component {number} {gradient(ends)}" for number, ends in enumerate(color_ends(), start=1))
)


def patch_tokens(network: Backbone, photos: Sequence[Photograph]) -> list[Float[Tensor, "D h w"]]:
    """The patch features of each photograph, on the CPU."""
    inputs = (photo.for_network(network) for photo in photos)
    return [network.features(images).patches[0, 0].float().cpu() for images in inputs]


def _heads(network: Backbone, photos: Sequence[Photograph]) -> list[Float[Tensor, "heads h w"]]:
    inputs = (photo.for_network(network) for photo in photos)
    return [attention_maps(network, images)[0].float().cpu() for images in inputs]


def row(name: str, pictures: dict[str, tuple[Image.Image, bool]]) -> str:
    """Pictures of one photograph side by side, by their captions; maps of few pixels are exact."""
    return "".join(
        figure(picture(image, f"{name}: {caption}", exact=exact), caption)
        for caption, (image, exact) in pictures.items()
    )


# ----------------------------------------------------------------------------------- attention
def attention(
    networks: Networks, photos: Sequence[Photograph], origin: str, details: bool = True
) -> str:
    """A section on the attention of the last block's CLS token; empty for networks without one.

    Args:
        networks: several, whose maps stand side by side.
        photos: the photographs, one below the other.
        origin: a sentence on where they come from.
        details: show also the mask and each head of the first network.
    """
    networks = {name: network for name, network in networks.items() if network.heads}
    if not networks:
        return ""
    maps, blocks = computed(networks, lambda network: _heads(network, photos)), []
    first = next(iter(networks))
    for place, photo in enumerate(photos):
        image, strip = photo.picture, ""
        pictures = {photo.name: (image, False)}
        for name, heads in maps.items():
            mean = heads[place].mean(dim=0)
            pictures[f"{name}, mean of the heads"] = (overlay(image, mean), False)
            if details and name == first:
                caption = f"{name}: the patches that hold 60 % of the attention"
                pictures[caption] = (cut_out(image, mass_mask(mean)), False)
                strip = _strip(name, photo.name, heads[place])
        shown = row(photo.name, pictures)
        blocks.append(f'<div class="block"><div class="pictures">{shown}</div>{strip}</div>')
    intro = (
        "The attention of the CLS token, the vector that represents the image, to each patch in "
        "the last block. The network was trained without labels or masks. Good: attention "
        "concentrates on objects and not on the background, and an untrained network does not. "
        f"{origin}"
    )
    colors = ATTENTION_LEGEND + (HEAD_LEGEND if details else "")
    return f"<h2>Attention</h2><p>{escape(intro)}</p>{colors}{''.join(blocks)}"


def _strip(network: str, name: str, heads: Float[Tensor, "heads h w"]) -> str:
    pictures = [
        picture(colored(values, "viridis"), f"{name}: {network}, head {head}", exact=True)
        for head, values in enumerate(heads)
    ]
    caption = f"{network}, each of the {len(heads)} heads alone, from head 0"
    return figure(f'<div class="heads">{"".join(pictures)}</div>', caption)


# ---------------------------------------------------------------------------------- components
def component_maps(networks: Networks, photos: Sequence[Photograph]) -> str:
    """A section with the first three principal components of the patch tokens as colours."""
    tokens = computed(networks, lambda network: patch_tokens(network, photos))
    maps = {name: components(patches) for name, patches in tokens.items()}
    blocks = []
    for place, photo in enumerate(photos):
        pictures = {photo.name: (photo.picture, False)}
        pictures |= {name: (Image.fromarray(found[place]), True) for name, found in maps.items()}
        blocks.append(f'<div class="block pictures">{row(photo.name, pictures)}</div>')
    intro = (
        "The first three principal components of the patch features. Each network has its own "
        "components, of all images below together: equal colours mean similar features, also "
        "between images. Good: an object has one colour, with edges at its outline, and other "
        "objects have others. An untrained network mostly repeats the brightness and colour of the "
        "pixels."
    )
    title = "<h2>Components of the patch features</h2>"
    return f"{title}<p>{escape(intro)}</p>{COMPONENT_LEGEND}{''.join(blocks)}"
