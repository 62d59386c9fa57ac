from __future__ import annotations

import json
import pickle
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from dino.data.images import preprocessing
from dino.data.images.decode import as_picture, crop_resize, read_image, to_pil, to_rgb, to_tensor
from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD, PixelFormat
from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


# ---------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.gif"])
def test_lossless_formats(name: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (7, 5), RED)
    path = saved(picture, tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (7, 5))
    assert image.getpixel((3, 2)) == RED


def test_jpeg_in_colour_grey_and_cmyk(pictures: list[Image.Image], tmp_path: Path) -> None:
    for mode in ("RGB", "L", "CMYK"):
        path = saved(pictures[0].convert(mode), tmp_path / f"{mode}.jpg", quality=95)
        image = read_image(path)
        expected = np.asarray(pictures[0].convert(mode).convert("RGB"), dtype=float)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image) - expected).mean() < 4


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    wide = Image.new("RGB", (20, 10))
    wide.paste(RED, (0, 0, 20, 5))  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image = read_image(saved(wide, tmp_path / "turned.png", exif=exif))
    assert image.size == (10, 20)
    assert image.getpixel((8, 10)) == RED  # red on the right
    assert image.getpixel((1, 10)) == (0, 0, 0)


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    for mode, colour in (("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))):
        path = saved(Image.new(mode, (4, 4), colour), tmp_path / f"{mode}.png")
        assert read_image(path).getpixel((0, 0)) == WHITE
    half = saved(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), tmp_path / "half.png")
    assert read_image(half).getpixel((0, 0)) == (255, 127, 127)
    palette = Image.new("P", (4, 4))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    path = saved(palette, tmp_path / "palette.png", transparency=0)
    assert read_image(path).getpixel((0, 0)) == WHITE
    assert read_image(path).getpixel((1, 1)) == RED


def test_sixteen_bits_keep_their_scale(tmp_path: Path) -> None:
    levels = np.array([[0, 256, 257, 128 * 257, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        image = as_picture(read_image(saved(Image.fromarray(levels), tmp_path / name)))
        assert image.mode == "RGB"
        assert np.asarray(image)[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_numbers_without_a_range_are_stretched(tmp_path: Path) -> None:
    values = np.array([[-2.0, 0.0, np.nan, 2.0, np.inf]], dtype=np.float32)
    image = as_picture(read_image(saved(Image.fromarray(values), tmp_path / "a.tif")))  # NaN: mean
    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 160, 255, 255]
    integers = Image.fromarray(np.array([[1000, 3000]], dtype=np.int32))
    assert np.asarray(to_rgb(integers))[0, :, 2].tolist() == [0, 255]
    for constant in (5.0, np.nan):
        flat = Image.fromarray(np.full((2, 2), constant, dtype=np.float32))
        assert np.asarray(to_rgb(flat)).max() == 0


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE)]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(path).getpixel((0, 0)) == RED


def test_errors_name_the_file(tmp_path: Path, pictures: list[Image.Image]) -> None:
    whole = saved(pictures[0], tmp_path / "whole.jpg").read_bytes()
    damaged = {
        "missing.jpg": (None, "missing"),
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"this is a text", "not an image"),
        "cut.jpg": (whole[: len(whole) // 2], "damaged"),
    }
    for name, (content, defect) in damaged.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert (caught.value.path, caught.value.defect) == (str(tmp_path / name), defect)
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(ImageError, match=r"folder\.jpg") as caught:
        read_image(tmp_path / "folder.jpg")
    assert caught.value.defect == "unreadable"


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("RGB", (100, 100)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        ImageError, match=r"bomb\.png.*it has 10,000, more than 2,000 pixels: cut"
    ) as caught:
        read_image(path)
    assert caught.value.defect == "too large"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow says of damaged metadata
@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1), junk=st.binary(min_size=1, max_size=40))
def test_damaged_bytes_are_an_image_or_an_image_error(
    place: float, junk: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for kind in ("png", "jpg", "gif", "tif", "bmp", "webp"):
        path = folder / f"damaged.{kind}"
        Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(path)
        content = path.read_bytes()
        first = int(place * len(content))
        path.write_bytes(content[:first] + junk + content[first + len(junk) :])
        with suppress(ImageError):
            assert as_picture(read_image(path)).mode == "RGB"


def test_an_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "it is cut off", "empty")))
    assert (error.path, error.reason, error.defect) == ("a.jpg", "it is cut off", "empty")
    assert str(error) == "a.jpg cannot be read as an image: it is cut off"


# ---------------------------------------------------------------------------------- tensors
def test_tensors_and_back(pictures: list[Image.Image]) -> None:
    tensor = to_tensor(pictures[0])
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.uint8, (3, 96, 96))
    assert np.array_equal(np.asarray(to_pil(tensor)), np.asarray(pictures[0]))
    assert tuple(to_tensor(pictures[0].convert("L")).shape) == (1, 96, 96)


def test_samples_of_every_accepted_kind() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colour = np.stack([grey, grey + 1, grey + 2], axis=-1)
    for sample in (colour, torch.from_numpy(colour).permute(2, 0, 1), Image.fromarray(colour)):
        for wrapped in (sample, (sample, 7), [sample, "label"]):
            image = read_image(wrapped, "item 0")
            tensor = image if isinstance(image, torch.Tensor) else to_tensor(image)
            assert np.array_equal(tensor.permute(1, 2, 0).numpy(), colour)
    for sample in (grey, grey[:, :, None], torch.from_numpy(grey)[None]):
        assert torch.equal(read_image(sample, "item 0")[2], torch.from_numpy(grey))
    assert read_image(Image.fromarray(grey), "item 0").mode == "RGB"


@pytest.mark.parametrize(
    "sample",
    [
        torch.rand(3, 4, 4),
        torch.zeros(3, 0, 4, dtype=torch.uint8),
        np.zeros((4, 4), dtype=np.float32),
        np.zeros((2, 3, 4, 4), dtype=np.uint8),
        (),
        None,
    ],
)
def test_other_samples_are_refused_by_name(sample: object) -> None:
    with pytest.raises(ImageError, match=r"item 3 .* return a PIL image"):
        read_image(sample, "item 3")


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (
            torch.rand(3, 4, 4),
            r"\(255 \* image\).round\(\).to\(torch.uint8\) if these go from 0 to 1",
        ),
        (
            np.zeros((4, 4)),
            r"\(255 \* image\).round\(\).astype\(np.uint8\) if these go from 0 to 1",
        ),
        (np.zeros((4, 4, 3), np.int64), r"image.astype\(np.uint8\) if these go from 0 to 255"),
        (np.zeros((4, 4), bool), r"\(255 \* image\).*from 0 to 1"),
        ({"label": 1, "image": 2}, r"a dict of 'label', 'image'; .* item\['image'\]"),
        ({"x": 1}, r"item\['x'\]"),
    ],
)
def test_samples_of_other_types_are_refused_with_their_conversion(
    sample: object, words: str
) -> None:
    with pytest.raises(ImageError, match=words):
        read_image(sample, "item 3")


def test_samples_of_other_channels_are_refused_by_name() -> None:
    with pytest.raises(ImageError, match=r"item 3 .*4 channels, not 3: say --channels 4"):
        read_image(torch.zeros(4, 4, 4, dtype=torch.uint8), "item 3")


# ---------------------------------------------------------------------------------- cropping
BOXES = [
    ((0, 0, 96, 96), 96),  # as it is
    ((3, 5, 80, 70), 64),
    ((10, 20, 30, 24), 64),  # enlarged
    ((0, 0, 96, 96), 32),
    ((40, 40, 50, 9), 24),
    ((95, 95, 1, 1), 8),
]


@pytest.mark.parametrize(("box", "size"), BOXES)
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_pillows(
    pictures: list[Image.Image], box: tuple[int, int, int, int], size: int, flip: bool
) -> None:
    """Within one level, and within 0.02 on average."""
    top, left, height, width = box
    for picture in pictures[:-1]:
        crop = picture.crop((left, top, left + width, top + height))
        theirs = crop.resize((size, height), Image.Resampling.BICUBIC)
        theirs = theirs.resize((size, size), Image.Resampling.BICUBIC)
        if flip:
            theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for image in (to_tensor(picture), to_tensor(picture).contiguous()):
            ours = crop_resize(image, box, size, flip)
            assert ours.dtype == torch.uint8
            difference = (ours.int() - to_tensor(theirs).int()).abs().float()
            assert difference.max() <= 1
            assert difference.mean() <= 0.02


def test_crops_are_nearly_those_of_pillow_in_one_call(pictures: list[Image.Image]) -> None:
    """Which may begin with the height: within half a level on average."""
    for picture in pictures:
        theirs = picture.crop((20, 3, 70, 93)).resize((64, 64), Image.Resampling.BICUBIC)
        ours = crop_resize(to_tensor(picture), (3, 20, 90, 50), 64, False)
        assert (ours.int() - to_tensor(theirs).int()).abs().float().mean() <= 0.5


def test_crops_of_a_grey_tensor(pictures: list[Image.Image]) -> None:
    """As `as_image` makes them: three channels that share one memory."""
    grey = read_image(to_tensor(pictures[0].convert("L")), "grey")
    view = crop_resize(grey, (5, 5, 60, 70), 32, False)
    assert torch.equal(view[0], view[1])
    assert torch.equal(view, crop_resize(grey.contiguous(), (5, 5, 60, 70), 32, False))


# ---------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(500, 375), (90, 200), (64, 64), (40, 30)])
def test_preprocessing_is_torchvisions(mode: str, size: tuple[int, int]) -> None:
    picture = Image.effect_noise(size, 80).convert("RGB")
    preprocess = Preprocessing(resize=72, crop=64, mean=(0.4, 0.5, 0.6), interpolation=mode)
    theirs = transforms.Compose(
        [
            transforms.Resize(72, transforms.InterpolationMode(mode)),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize((0.4, 0.5, 0.6), (0.229, 0.224, 0.225)),
        ]
    )
    assert torch.equal(preprocess(picture), theirs(picture))


@pytest.mark.parametrize("channels", [3, 5])
@pytest.mark.parametrize("size", [(20_001, 1), (1, 20_000), (1200, 100)])
def test_a_long_image_is_cropped_before_it_is_resized(
    size: tuple[int, int], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.randint(0, 256, (channels, *size), dtype=torch.uint8)
    preprocess = Preprocessing(72, 64, (0.0,) * channels, (1.0,) * channels)
    preprocess = replace(preprocess, pixels=PixelFormat(channels))
    functional, longest = transforms.functional, []
    resize = functional.resize

    def recorded(image: object, *sides: object, **options: object) -> object:
        resized = resize(image, *sides, **options)
        longest.append(max(functional.get_dimensions(resized)))
        return resized

    monkeypatch.setattr(functional, "resize", recorded)
    ours = preprocess(pixels)
    assert max(longest) <= 9 * 72
    if size == (1200, 100):
        monkeypatch.setattr(preprocessing, "LONGEST", 1000)
        assert torch.allclose(ours, preprocess(pixels), atol=1.01 / 255)
        assert max(longest) == 12 * 72


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_preprocessing_may_squash(mode: str) -> None:
    """Both sides to one length, then the central crop."""
    picture = Image.effect_noise((90, 200), 80).convert("RGB")
    preprocess = Preprocessing(resize=40, crop=32, interpolation=mode, squash=True)
    resized = picture.resize((40, 40), Image.Resampling[mode.upper()])
    cropped = to_tensor(resized.crop((4, 4, 36, 36))).float() / 255
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = (cropped - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(preprocess(picture), expected, atol=1e-6)


def test_preprocessing_takes_any_mode() -> None:
    preprocess = Preprocessing(resize=32, crop=32)
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        assert preprocess(Image.new(mode, (40, 50))).shape == (3, 32, 32)


def test_preprocessing_survives_json() -> None:
    preprocess = Preprocessing(resize=32, crop=30, interpolation="bilinear", squash=True)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert Preprocessing.from_dict({}) == Preprocessing()


@pytest.mark.parametrize("wrong", [{"sise": 3}, {"interpolation": "nearest"}])
def test_wrong_preprocessing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"sise|interpolation"):
        Preprocessing.from_dict(wrong)
