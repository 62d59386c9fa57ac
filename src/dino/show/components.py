"""`dino components`: the principal components of patch features as pictures, and parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from PIL import Image

from dino.data.images.contact_sheet import Cell, contact_sheet
from dino.data.images.map_overlay import CATEGORIES, Color
from dino.data.images.png import save_picture
from dino.data.sampler import spread
from dino.data.sources.named_inputs import named_inputs
from dino.features.command import print_paths, provenance, save_arrays
from dino.files import UserError, atomic_json, check_output, check_outside
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import memory_errors, pick_device
from dino.settings import Range, validated
from dino.show import patch_pca
from dino.show.component_pictures import component_picture, part_picture, with_legend
from dino.show.legends import below, gradients, letters_for
from dino.show.patch_maps import PatchMap, PatchMaps
from dino.show.patch_pca import Basis, Mapping, color_ends
from dino.weights.load import load

SIZE = 480
"""Shorter side of an image, in pixels."""

SHEET, PER_ROW, TILE, LETTERS = 12, 2, 240, 16
"""Most images of a contact sheet, images a row, side of its pictures and height of the letters of
its legend in pixels."""


@dataclass(frozen=True, kw_only=True)
class ComponentSettings:
    """Show the principal components of patch features as colours, and parts."""

    examples: ClassVar[dict[str, str]] = {"out": "components"}

    weights: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Run folder, file of weights or published name."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")]
    """Images, folders, patterns such as 'photos/*.jpg', lists, or demo."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the pictures."""
    basis: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A basis that --save-basis wrote: the images are shown in its colours."""
    save_basis: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the basis of these images (.safetensors)."""
    foreground: bool = False
    """Components and parts of the foreground only: the side of the first component of all patches
    of which fewer lie at the borders of the images."""
    colors: Mapping = "opponent"
    """opponent: component 1 from dark to light, 2 from blue to yellow, 3 from green to red, so that
    readers who confuse red with green miss the last alone; rgb: red, green and blue."""
    parts: Annotated[int, Range(low=2, high=len(CATEGORIES))] | None = None
    """Also show so many clusters of patches (k-means)."""
    block: int | None = None
    """Whose features: counted from 0, or from the end; by default the last, or that of the
    basis."""
    size: Annotated[int, Range(low=1, high=10**5)] | None = None
    """Shorter side of the network's input, to which images are resized; by default 480, or that of
    the basis; nothing is cropped."""
    fit_images: Annotated[int, Range(low=1, high=10**6)] = 64
    """The basis is computed from so many images at most, evenly spread over all."""
    arrays: bool = False
    """Also write the numbers of each image (.npz)."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(settings: ComponentSettings) -> dict[str, Any]:
    """`dino components`: pictures, and components.json with what they show; prints the paths.

    Returns:
        The content of the JSON.

    Raises:
        UserError: for weights, images or a basis that do not exist or do not fit.
    """
    settings = validated(settings)
    _check_outputs(settings)
    backbone = load(settings.weights, pick_device(settings.device))
    basis, about = _saved(settings, backbone)
    inputs = named_inputs(settings.data, backbone.preprocessing.pixels)
    size, block = (
        about[name] if given is None else given
        for name, given in (("size", settings.size), ("block", settings.block))
    )
    with bar("images", len(inputs)) as advance:
        maps = PatchMaps(backbone, inputs, size, block, advance)
        about = {**about, "size": size, "block": maps.block}
        if basis is None:
            chosen = maps.cache(spread(len(inputs), settings.fit_images))
            about |= {"data": list(settings.data), "images": len(chosen)}
            basis = _fitted(chosen, settings)
        shown = _write_pictures(maps, basis, settings)
    maps.warn_skipped()
    sheet, listing = settings.out / "sheet.png", settings.out / "components.json"
    others = [sheet, listing]
    if settings.save_basis is not None:
        patch_pca.save(basis, settings.save_basis, backbone, about)
        others.insert(0, settings.save_basis)
    content = {
        "shown": shown,
        "sheet": str(sheet),
        "skipped": [error.path for error in maps.skipped.values()],
        "basis": {**about, "variance": basis.variance.tolist()},
        **provenance(backbone, settings),
    }
    atomic_json(listing, content)
    print_paths([file for facts in shown for file in facts["files"]], others)
    return content


def _fitted(chosen: list[PatchMap], settings: ComponentSettings) -> Basis:
    with memory_errors("--fit-images"):
        return Basis.fit(
            [one.tokens for one in chosen],
            foreground=settings.foreground,
            parts=settings.parts or 0,
        )


# -------------------------------------------------------------------------------------- settings
def _check_outputs(settings: ComponentSettings) -> None:
    check_output(settings.out, folder=True)
    for word in settings.data:
        check_outside(settings.out, word)
        check_outside(settings.save_basis, word, "--save-basis")
    if settings.save_basis is not None:
        if settings.basis is not None:
            raise UserError("--basis shows a basis and --save-basis writes one: leave one out")
        check_output(settings.save_basis, (".safetensors",), option="--save-basis")


def _saved(settings: ComponentSettings, backbone: Backbone) -> tuple[Basis | None, dict[str, Any]]:
    """The basis of --basis, if there is one, and the defaults of size and block.

    Raises:
        UserError: if it has not what the settings want.
    """
    if settings.basis is None:
        return None, {"size": SIZE, "block": -1}
    basis, about = patch_pca.load(settings.basis, backbone)
    block = None if settings.block is None else settings.block % (backbone.depth or 1)
    for option, given, has in (
        ("--foreground", settings.foreground or None, basis.foreground is not None),
        ("--parts", settings.parts, 0 if basis.centers is None else len(basis.centers)),
        ("--block", block, about["block"]),
    ):
        if given is not None and given != has:
            raise UserError(
                f"the basis {settings.basis} was written with another {option}: leave it out here, "
                "or write another basis with --save-basis"
            )
    return basis, about


# -------------------------------------------------------------------------------------- pictures
def _write_pictures(
    maps: PatchMaps, basis: Basis, settings: ComponentSettings
) -> list[dict[str, Any]]:
    """Write the pictures of each image, and the contact sheet; what is shown of each image."""
    parts = 0 if basis.centers is None else len(basis.centers)
    in_sheet, cells = {*spread(len(maps.inputs), SHEET)}, list[Cell]()
    shown: list[dict[str, Any]] = []
    for index, named in enumerate(maps.inputs):
        if (one := maps.read(index)) is None:
            continue
        pictures, files = _pictures(one, basis, settings.colors), []
        for kind, picture in pictures.items():
            files.append(settings.out / f"{named.name}-{kind}.png")
            letters = letters_for(picture.width)
            save_picture(with_legend(picture, parts * (kind == "parts"), letters), files[-1])
        if settings.arrays:
            files.append(settings.out / f"{named.name}.npz")
            _write_arrays(files[-1], one, basis, settings.colors)
        grid = [*one.tokens.shape[1:]]
        shown.append({"path": named.path, "grid": grid, "files": [str(file) for file in files]})
        last = [Cell(one.picture, Path(named.path).name)]
        last += [Cell(picture, kind) for kind, picture in pictures.items()]
        cells += last if index in in_sheet else []
    maps.check_usable()
    cells, columns = cells or last, PER_ROW * len(last)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    sheet = contact_sheet(rows, TILE, _title(basis), compact=True)
    sheet = below(sheet, gradients(_legend(basis, settings.colors), LETTERS))
    save_picture(with_legend(sheet, parts, LETTERS), settings.out / "sheet.png")
    return shown


def _pictures(one: PatchMap, basis: Basis, mapping: Mapping) -> dict[str, Image.Image]:
    """The pictures of an image, by what they show."""
    mask = None if basis.foreground is None else basis.foreground(one.tokens)
    found = {"components": component_picture(one.picture, basis.colors(one.tokens, mapping), mask)}
    if basis.centers is not None:
        found["parts"] = part_picture(one.picture, basis.parts(one.tokens), mask)
    return found


def _write_arrays(path: Path, one: PatchMap, basis: Basis, mapping: Mapping) -> None:
    arrays: dict[str, Any] = {"components": basis.project(one.tokens)}
    arrays["colors"] = basis.colors(one.tokens, mapping)
    if basis.foreground is not None:
        arrays["foreground"] = basis.foreground(one.tokens)
    if basis.centers is not None:
        arrays["parts"] = basis.parts(one.tokens)
    save_arrays(path, **arrays)


def _title(basis: Basis) -> str:
    """What the colours of a contact sheet mean."""
    what = "foreground patches" if basis.foreground is not None else "patch features"
    return (
        f"Principal components of the {what}. Equal colours mean similar features, also between "
        "images."
    )


def _legend(basis: Basis, mapping: Mapping) -> dict[str, tuple[Color, Color]]:
    """The colours of each component, with the share of the variance that it explains."""
    first, second, third = (f"{100 * share:.0f} %" for share in basis.variance)
    names = [f"component 1 ({first} of the variance)", f"2 ({second})", f"3 ({third})"]
    return dict(zip(names, color_ends(mapping), strict=True))
