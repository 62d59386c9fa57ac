"""What a user gives as images: everything that `embed` reads, and tensors that are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dino.data.images.pixel_format import PixelFormat
from dino.data.sources.open import open_source
from dino.files import UserError
from dino.models import backbone
from dino.models.backbone import Backbone
from dino.models.create import create
from dino.models.inputs import read_images, read_sample

LEVELS = np.random.default_rng(0).integers(0, 256, (3, 40, 36, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(levels) for levels in LEVELS]


@pytest.fixture(scope="module")
def vit() -> Backbone:
    torch.manual_seed(0)
    return create("vit_tiny", embed_dim=24, depth=2, heads=2, patch_size=8, image_size=32).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for name, picture in zip(("a/0.png", "a/1.png", "b/2.png"), PICTURES, strict=True):
        (root / name).parent.mkdir(exist_ok=True)
        picture.save(root / name)
    return root


@pytest.fixture(scope="module")
def expected(vit: Backbone) -> np.ndarray:
    with torch.no_grad():
        return vit(torch.stack([vit.preprocessing(picture) for picture in PICTURES])).numpy()


class Pairs(Dataset[Any]):
    """A data set that has no `__iter__` and raises no `IndexError`."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return PICTURES[index % 3], 7


SEVERAL: dict[str, Callable[[Path], Any]] = {
    "folder": lambda folder: folder,
    "name of a folder": str,
    "paths": lambda folder: sorted(folder.rglob("*.png")),
    "names": lambda folder: [str(path) for path in sorted(folder.rglob("*.png"))],
    "array of names": lambda folder: np.array(sorted(map(str, folder.rglob("*.png")))),
    "iterator of paths": lambda folder: iter(sorted(folder.rglob("*.png"))),
    "source": open_source,
    "pictures": lambda _: PICTURES,
    "tuple of pictures": lambda _: tuple(PICTURES),
    "generator of pictures": lambda _: (picture for picture in PICTURES),
    "pairs": lambda _: [(picture, 7) for picture in PICTURES],
    "data set of pairs": lambda _: Pairs(),
    "array": lambda _: LEVELS,
    "array, channels first": lambda _: LEVELS.transpose(0, 3, 1, 2),
    "arrays": lambda _: list(LEVELS),
    "floats": lambda _: LEVELS / 255,
    "tensor": lambda _: torch.from_numpy(LEVELS).permute(0, 3, 1, 2),
    "tensor of floats": lambda _: torch.from_numpy(LEVELS).permute(0, 3, 1, 2) / 255,
    "tensors": lambda _: list(torch.from_numpy(LEVELS)),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_embed_takes_several_images(
    kind: str, vit: Backbone, folder: Path, expected: np.ndarray
) -> None:
    rows = vit.embed(SEVERAL[kind](folder), batch=2)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


ONE: dict[str, Callable[[Path], Any]] = {
    "path": lambda folder: folder / "b" / "2.png",
    "name": lambda folder: str(folder / "b" / "2.png"),
    "open file": lambda folder: BytesIO((folder / "b" / "2.png").read_bytes()),
    "picture": lambda _: PICTURES[2],
    "array": lambda _: LEVELS[2],
    "array, channels first": lambda _: LEVELS[2].transpose(2, 0, 1),
    "floats": lambda _: (LEVELS[2] / 255).astype(np.float32),
    "tensor": lambda _: torch.from_numpy(LEVELS[2]).permute(2, 0, 1),
    "tensor, channels last": lambda _: torch.from_numpy(LEVELS[2]),
    "tensor of floats": lambda _: torch.from_numpy(LEVELS[2]).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("kind", ONE)
def test_embed_and_preprocess_take_one_image(
    kind: str, vit: Backbone, folder: Path, expected: np.ndarray
) -> None:
    rows = vit.embed(ONE[kind](folder))
    np.testing.assert_allclose(rows, expected[2:], rtol=1e-5, atol=1e-6)
    assert torch.equal(vit.preprocess(ONE[kind](folder)), vit.preprocessing(PICTURES[2]))


def test_a_grey_array_is_repeated(vit: Backbone) -> None:
    grey = LEVELS[0, ..., 0]
    np.testing.assert_allclose(vit.embed(grey), vit.embed(Image.fromarray(grey)), rtol=1e-5)


def test_values_of_a_pixel_format_with_a_range_are_not_scaled_twice() -> None:
    pixels = PixelFormat(channels=1, low=(0.0,), high=(4000.0,))
    values = np.array([[0.0, 1000.0], [4000.0, 9000.0]])
    sample = read_sample(values, pixels)
    assert isinstance(sample, Tensor)
    assert sample.tolist() == [[[0, 64], [255, 255]]]
    for data in (values[None, :, :, None], open_source(values[None])):
        (only,) = read_images(data, pixels)
        assert isinstance(only, Tensor)
        assert torch.equal(only, sample)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (LEVELS.astype(np.float32), r"image 0 .* from 0 to 255: give floats from 0 to 1 or uint8"),
        ([LEVELS[0], LEVELS[1] / 127 - 1], r"image 1 .* from -1 to .*images to backbone\(images\)"),
        (np.full((4, 4, 3), np.nan), r"from nan to nan"),
        (LEVELS[0].astype(np.int64), r"image.astype\(np.uint8\) if these go from 0 to 255"),
        (np.zeros((5, 8, 8), np.uint8), r"\(5, 8, 8\) is neither \[H, W, 3\] nor .* four axes"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), r"shape \(2, 2, 8, 8, 3\) is no image"),
        ({"image": PICTURES}, "cannot take images from a dict: give a file, a folder"),
        ([{"image": PICTURES[0]}], r"image 0 .* item\['image'\]"),
        (3, "cannot take images from a int"),
        (b"bytes", "cannot take images from a bytes"),
        ("nowhere.png", "nowhere.png cannot be read as an image: there is no such file"),
    ],
)
def test_what_embed_refuses(vit: Backbone, images: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        vit.embed(images)
    assert "\n" not in str(caught.value)


def test_a_batch_of_none_is_refused(vit: Backbone) -> None:
    with pytest.raises(UserError, match="batch is 0: it must be an integer of at least 1"):
        vit.embed(PICTURES, batch=0)


# ---------------------------------------------------------------------------- tensors for forward
GOOD = torch.zeros(2, 3, 32, 32)
WRONG: dict[str, tuple[Any, str]] = {
    "uint8": (GOOD.byte(), "they are uint8: give them to backbone.embed, or normalise"),
    "int64": (GOOD.long(), "they are int64"),
    "no batch axis": (GOOD[0], r"\[3, 32, 32\], not \[B, 3, H, W\]: give images\[None\]"),
    "channels last": (GOOD.permute(0, 2, 3, 1), r"give images.permute\(0, 3, 1, 2\)"),
    "one, channels last": (GOOD[0].permute(1, 2, 0), r"permute\(2, 0, 1\)\[None\]"),
    "grey": (GOOD[:, :1], r"give images.expand\(-1, 3, -1, -1\)"),
    "five channels": (torch.zeros(2, 5, 32, 32), r"select 3 channels, or .* channels=5"),
    "two axes": (torch.zeros(32, 32), "give a tensor of four axes"),
    "double": (GOOD.double(), r"are float64 and the weights are float32: .*to\(torch.float32\)"),
    "half": (GOOD.half(), "they are float16"),
    "device": (GOOD.to("meta"), r"are on meta and the network is on cpu: give images.to\('cpu'\)"),
    "array": (GOOD.numpy(), "they are a ndarray: give them to backbone.embed, or a tensor"),
    "picture": (PICTURES[0], "they are a Image: give them to backbone.embed"),
    "list": ([GOOD[0]], "they are a list"),
}


@cache
def made(arch: str) -> Backbone:
    return create(arch, image_size=32).eval()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("arch", ["vit_tiny", "resnet50", "timm:resnet18"])
def test_wrong_tensors_are_refused_with_their_conversion(kind: str, arch: str) -> None:
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    network, (images, words) = made(arch), WRONG[kind]
    for call in (network, network.features):
        with pytest.raises(UserError, match=f"cannot take these images, since .*{words}") as caught:
            call(images)
        assert "\n" not in str(caught.value)


def test_types_that_autocast_converts_are_accepted(vit: Backbone) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert vit(GOOD.bfloat16()).shape == (2, 24)
    with pytest.raises(UserError, match="bfloat16"):
        vit(GOOD.bfloat16())


@pytest.mark.usefixtures("unchecked")
def test_graphs_hold_no_check(vit: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit(images)
    monkeypatch.setattr(backbone, "check_images", lambda *_: pytest.fail("it is checked"))
    batch = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(vit, (images,), dynamic_shapes=batch).module()
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's, which gives tracing up
        traced = torch.jit.trace(vit, (images,), check_trace=False)
        torch.testing.assert_close(exported(images[:1]), expected[:1])
        for network in (compiled, traced):
            torch.testing.assert_close(network(images), expected)


# ---------------------------------------------------------------------------- repr
def test_a_network_is_one_line(vit: Backbone) -> None:
    assert repr(vit) == "<dino vit_tiny/8: weights from no file>"
    assert repr(create("resnet50")) == "<dino resnet50: weights from no file>"
    assert "patch_embed" in torch.nn.Module.__repr__(vit)
