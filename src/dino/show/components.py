"""`dino components`: the principal components of patch features as pictures, and parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import tyro
from PIL import Image

from dino.data.images.contact_sheet import Cell, contact_sheet
from dino.data.sampler import spread
from dino.data.sources.open import open_images
from dino.files import UserError, atomic_json, check_output, check_outside, flat_names, replacing
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import memory_errors, pick_device
from dino.settings import Range, validated
from dino.show import patch_pca
from dino.show.component_pictures import PALETTE, component_picture, part_picture, with_legend
from dino.show.patch_maps import PatchMap, PatchMaps
from dino.show.patch_pca import Basis
from dino.weights.load import fingerprint, load

SIZE = 480
"""Shorter side of an image, in pixels."""

SHEET, PER_ROW, TILE = 12, 2, 240
"""Most images of a contact sheet, images a row, and side of its pictures in pixels."""


@dataclass(frozen=True, kw_only=True)
class ComponentSettings:
    """Show the principal components of patch features as colours, and parts."""

    examples: ClassVar[dict[str, str]] = {"out": "components/"}

    weights: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Run folder, file of weights or published name."""
    data: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Images: an image, a folder, a list (.txt, .csv, .tsv, .parquet), or demo."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the pictures."""
    basis: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A basis that --save-basis wrote: the images are shown in its colours."""
    save_basis: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the basis of these images (.safetensors)."""
    foreground: bool = False
    """Components and parts of the foreground only: the side of the first component of all patches
    of which fewer lie at the borders of the images."""
    parts: Annotated[int, Range(low=2, high=len(PALETTE))] | None = None
    """Also show so many clusters of patches (k-means)."""
    block: int | None = None
    """Block of the features, negative from the end; by default the last, or that of the basis."""
    size: Annotated[int, Range(low=1, high=10**5)] | None = None
    """Shorter side of an image in pixels; by default 480, or that of the basis."""
    fit_images: Annotated[int, Range(low=1, high=10**6)] = 64
    """The basis is computed from so many images at most, evenly spread over all."""
    arrays: bool = False
    """Also write the numbers of each picture (.npz)."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(settings: ComponentSettings) -> dict[str, Any]:
    """`dino components`: pictures of each image, a contact sheet, and a JSON file about them.

    Returns:
        The JSON's content.

    Raises:
        UserError: for weights, images or a basis that do not exist or do not fit.
    """
    settings = validated(settings)
    _check_outputs(settings)
    backbone = load(settings.weights, pick_device(settings.device))
    basis, about = _saved(settings, backbone)
    source = open_images(settings.data, backbone.preprocessing.pixels)
    size, block = (
        about[name] if given is None else given
        for name, given in (("size", settings.size), ("block", settings.block))
    )
    with bar("images", len(source)) as advance:
        maps = PatchMaps(backbone, source, size, block, advance)
        if basis is None:
            fitted = [one.tokens for one in maps.keep(spread(len(source), settings.fit_images))]
            with memory_errors("--fit-images"):
                basis = Basis.fit(fitted, foreground=settings.foreground, parts=settings.parts or 0)
            about = {"data": settings.data, "images": len(fitted)}
            about |= {"size": size, "block": maps.block}
        pictures = _write_pictures(maps, basis, settings)
    maps.warn_skipped()
    if settings.save_basis is not None:
        patch_pca.save(basis, settings.save_basis, backbone, about)
        print(settings.save_basis)
    content = {
        "weights": fingerprint(backbone),
        "loaded": backbone.loaded,
        "size": size,
        "block": maps.block,
        "basis": {**about, "file": settings.basis and str(settings.basis)},
        "variance": basis.variance.tolist(),
        "pictures": pictures,
        "skipped": [error.path for error in maps.skipped.values()],
    }
    atomic_json(settings.out / "components.json", content)
    print(settings.out / "components.json", settings.out / "sheet.png", sep="\n")
    return content


# -------------------------------------------------------------------------------------- settings
def _check_outputs(settings: ComponentSettings) -> None:
    check_output(settings.out, folder=True)
    check_outside(settings.out, settings.data)
    if settings.save_basis is not None:
        if settings.basis is not None:
            raise UserError("--basis shows a basis and --save-basis writes one: leave one out")
        check_output(settings.save_basis, (".safetensors",), option="--save-basis")
        check_outside(settings.save_basis, settings.data, "--save-basis")


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
) -> dict[str, list[str]]:
    """Write the pictures of each image, and the contact sheet; their names by image."""
    count, parts = len(maps.source), 0 if basis.centers is None else len(basis.centers)
    paths = [maps.source.path(index) for index in range(count)]
    shown, cells, written = {*spread(count, SHEET)}, list[Cell](), dict[str, list[str]]()
    for index, (path, name) in enumerate(zip(paths, flat_names(paths), strict=True)):
        if (one := maps.read(index)) is None:
            continue
        pictures = _pictures(one, basis)
        files = {f"{name}.{kind}.png": picture for kind, picture in pictures.items()}
        for file, picture in files.items():
            legend = parts if file.endswith(".parts.png") else 0
            _save(with_legend(picture, legend) if legend else picture, settings.out / file)
        if settings.arrays:
            _write_arrays(settings.out / f"{name}.npz", one, basis)
        written[path] = [*files, *[f"{name}.npz"] * settings.arrays]
        if index in shown or not cells:
            cells += [Cell(one.picture, name), *(Cell(p, kind) for kind, p in pictures.items())]
    maps.check_usable()
    columns = PER_ROW * (3 if parts else 2)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    sheet = contact_sheet(rows, TILE, _title(basis))
    _save(with_legend(sheet, parts) if parts else sheet, settings.out / "sheet.png")
    return written


def _save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")


def _pictures(one: PatchMap, basis: Basis) -> dict[str, Image.Image]:
    """The pictures of an image, by what they show."""
    mask = None if basis.foreground is None else basis.foreground(one.tokens)
    found = {"components": component_picture(one.picture, basis.colors(one.tokens), mask)}
    if basis.centers is not None:
        found["parts"] = part_picture(one.picture, basis.parts(one.tokens), mask)
    return found


def _write_arrays(path: Path, one: PatchMap, basis: Basis) -> None:
    arrays: dict[str, Any] = {"components": basis.project(one.tokens)}
    arrays["colors"] = basis.colors(one.tokens)
    if basis.foreground is not None:
        arrays["foreground"] = basis.foreground(one.tokens)
    if basis.centers is not None:
        arrays["parts"] = basis.parts(one.tokens)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _title(basis: Basis) -> str:
    """What the colours of a contact sheet mean."""
    what = "foreground patches" if basis.foreground is not None else "patch features"
    red, green, blue = (f"{100 * share:.0f} %" for share in basis.variance)
    return (
        f"Red, green and blue: principal components 1, 2 and 3 of the {what} ({red}, {green} and "
        f"{blue} of their variance). Equal colours mean similar features, also between images."
    )
