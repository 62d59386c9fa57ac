"""Each operation against its twin in torchvision or Pillow on PIL images, with equal parameters.

The stated bound for every comparison is a mean absolute difference of 1.5 levels of 255; most
stay below 0.7, which is what the twins lose by cutting off fractions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from dino.data.images.decode import to_tensor
from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD
from dino.data.views import photometric
from dino.data.views.photometric import augment, normalize
from dino.data.views.random_streams import draw_views, generator
from dino.data.views.view_spec import JITTER_OPERATIONS, NEVER_SOLARIZE, PHOTOMETRIC, ViewSettings

BOUND = 1.5  # levels of 255, mean absolute difference
NEUTRAL = {
    "jitter": 0.0,
    "brightness": 1.0,
    "contrast": 1.0,
    "saturation": 1.0,
    "hue": 0.0,
    "first": 0.0,
    "second": 1.0,
    "third": 2.0,
    "fourth": 3.0,
    "grey": 0.0,
    "sigma": 0.0,
    "solarize": NEVER_SOLARIZE,
}


@pytest.fixture(autouse=True, params=["compiled", "batched"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with numba's kernels and with the operations of PyTorch."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    monkeypatch.setattr(photometric, "_numba_is_installed", lambda: request.param == "compiled")
    return request.param


def rows(count: int, **values: float) -> Tensor:
    settings = NEUTRAL | values
    return torch.tensor([[settings[name] for name in PHOTOMETRIC]] * count)


def levels(images: Tensor, params: Tensor) -> Tensor:
    """Augmented pixels from 0 to 255."""
    return augment(images, params, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) * 255


def stacked(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([to_tensor(picture) for picture in pictures])


def check(
    pictures: list[Image.Image], twin: Callable[[Image.Image], Image.Image], **values: float
) -> None:
    ours = levels(stacked(pictures), rows(len(pictures), **values))
    theirs = stacked([twin(picture) for picture in pictures]).float()
    difference = (ours - theirs).abs().mean(dim=(1, 2, 3))  # of each picture on its own
    assert difference.max() <= BOUND, f"{difference.tolist()} levels of 255"


# ---------------------------------------------------------------------------------- the twins
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.93, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors(pictures: list[Image.Image], name: str, factor: float) -> None:
    twin = getattr(F, f"adjust_{name}")
    check(pictures, lambda picture: twin(picture, factor), jitter=1.0, **{name: factor})


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.02, 0.0, 0.05, 0.1, 0.4])
def test_hue(pictures: list[Image.Image], turns: float) -> None:
    # Pillow keeps hue and saturation in 8 bits, so colours as loud as noise move by some levels.
    check(pictures[:-1], lambda picture: F.adjust_hue(picture, turns), jitter=1.0, hue=turns)


def test_grey(pictures: list[Image.Image]) -> None:
    check(pictures, lambda picture: F.rgb_to_grayscale(picture, 3), grey=1.0)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.81, 1.0, 1.5, 2.0, 5.0])
def test_blur(pictures: list[Image.Image], sigma: float) -> None:
    blur = ImageFilter.GaussianBlur(sigma)
    check(pictures, lambda picture: picture.filter(blur), sigma=sigma)


def test_blur_at_the_border_and_of_a_point(pictures: list[Image.Image]) -> None:
    """Largest difference, since a mean would hide a border treated differently."""
    corner = np.zeros((24, 24, 3), dtype=np.uint8)
    corner[0, 0], corner[12, 23], corner[12, 12] = 255, 255, 255
    for sigma in (0.4, 1.0, 2.0, 4.0):
        theirs = np.asarray(Image.fromarray(corner).filter(ImageFilter.GaussianBlur(sigma)))
        ours = levels(to_tensor(Image.fromarray(corner))[None], rows(1, sigma=sigma))
        assert np.abs(ours[0].permute(1, 2, 0).numpy() - theirs).max() <= 3


@pytest.mark.parametrize("threshold", [0, 1, 100, 128, 255])
def test_solarize_is_exact(pictures: list[Image.Image], threshold: int) -> None:
    ours = levels(stacked(pictures), rows(len(pictures), solarize=float(threshold)))
    theirs = stacked([ImageOps.solarize(picture, threshold) for picture in pictures])
    assert torch.equal(ours.round(), theirs.float())


def test_solarize_takes_what_would_round_to_the_threshold() -> None:
    pixels = torch.tensor([127.4, 127.6]).view(1, 1, 1, 2).expand(1, 3, 2, 2).clone()
    photometric.solarize_(pixels, torch.tensor([128.0]))
    assert torch.allclose(pixels[0, 0, 0], torch.tensor([127.4, 255 - 127.6]))


def twin_of(view: dict[str, float]) -> Callable[[Image.Image], Image.Image]:
    """The full chain as the reference composes it on a PIL image."""

    def run(picture: Image.Image) -> Image.Image:
        for place in ("first", "second", "third", "fourth"):
            name = JITTER_OPERATIONS[int(view[place])]
            if view["jitter"]:
                picture = getattr(F, f"adjust_{name}")(picture, view[name])
        if view["grey"]:
            picture = F.rgb_to_grayscale(picture, 3)
        if view["sigma"]:
            picture = picture.filter(ImageFilter.GaussianBlur(view["sigma"]))
        return ImageOps.solarize(picture, round(view["solarize"]))

    return run


def test_full_chains_in_random_orders(pictures: list[Image.Image]) -> None:
    """All parameters as training draws them: 40 images, among them every kind of wish."""
    views = [
        dict(zip(PHOTOMETRIC, view.row(), strict=True))
        for index in range(10)
        for view in draw_views(ViewSettings(local_count=2).specs(), 96, 96, generator(0, 0, index))
    ]
    chosen = [pictures[index % (len(pictures) - 1)] for index in range(len(views))]
    params = torch.tensor([list(view.values()) for view in views])
    theirs = stacked([twin_of(view)(p) for view, p in zip(views, chosen, strict=True)])
    difference = (levels(stacked(chosen), params) - theirs).abs().mean(dim=(1, 2, 3))
    assert difference.mean() <= BOUND
    assert difference.max() <= 2 * BOUND  # fractions cut off by up to six operations in a row


@settings(deadline=None, max_examples=50)
@given(
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    turns=st.floats(-0.5, 0.5),
)
def test_hue_keeps_value_and_chroma(colour: tuple[int, int, int], turns: float) -> None:
    pixels = torch.tensor(colour).view(1, 3, 1, 1).float()
    turned = pixels.clone()
    photometric.shift_hue_(turned, torch.tensor([turns]))
    assert torch.allclose(turned.amax(1), pixels.amax(1), atol=1e-3)
    assert torch.allclose(turned.amin(1), pixels.amin(1), atol=1e-3)
    photometric.shift_hue_(turned, torch.tensor([-turns]))
    assert torch.allclose(turned, pixels, atol=0.05)


# ---------------------------------------------------------------------------------- the batch
def drawn(count: int) -> Tensor:
    return torch.tensor(
        [
            view.row()
            for index in range(count)
            for view in draw_views(
                ViewSettings(local_count=0).specs(), 96, 96, generator(1, 0, index)
            )
        ]
    )


def test_neutral_parameters_change_nothing(pictures: list[Image.Image]) -> None:
    images = stacked(pictures)
    assert torch.equal(levels(images, rows(len(images))).round(), images.float())


def test_images_do_not_see_one_another(pictures: list[Image.Image]) -> None:
    images = stacked([pictures[index % len(pictures)] for index in range(24)])
    params = drawn(12)
    together = levels(images, params)
    for index in range(len(images)):
        alone = levels(images[index : index + 1], params[index : index + 1])
        assert torch.allclose(together[index : index + 1], alone, atol=1e-3)


def test_operations_on_the_entire_batch_give_the_same(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: neutral parameters for the images that are not to be changed."""
    images = stacked([pictures[index % len(pictures)] for index in range(24)])
    parts = levels(images, drawn(12))
    monkeypatch.setattr(
        photometric, "_apply_", lambda operation, pixels, _, *rest: operation(pixels, *rest)
    )
    batched = photometric.photometric_(images.float(), drawn(12))
    assert torch.allclose(batched, parts, atol=0.02)  # float32 blur radii


@pytest.mark.parametrize("channels", [1, 2, 4, 9])
def test_other_channels_than_rgb(channels: int) -> None:
    """Brightness, contrast, blur and solarise on nine bands, as on each band alone."""
    images = torch.randint(0, 256, (3, channels, 40, 40), dtype=torch.uint8)
    params = drawn(2)[:3]
    params[:, [PHOTOMETRIC.index("saturation"), PHOTOMETRIC.index("grey")]] = torch.tensor([1.0, 0])
    params[:, [PHOTOMETRIC.index("jitter"), PHOTOMETRIC.index("hue")]] = torch.tensor([1.0, 0])
    mean, std = [0.0] * channels, [1.0] * channels
    params[:, PHOTOMETRIC.index("contrast")] = 1.0  # contrast alone looks at all channels
    bands = [augment(images[:, [c]], params, [0.0], [1.0]) * 255 for c in range(channels)]
    together = augment(images, params, mean, std) * 255
    assert torch.allclose(together, torch.cat(bands, dim=1), atol=2e-3)


def test_contrast_of_other_channels_is_that_to_their_mean() -> None:
    images = torch.randint(0, 256, (2, 5, 16, 16), dtype=torch.uint8)
    ours = augment(images, rows(2, jitter=1.0, contrast=0.25), [0.0] * 5, [1.0] * 5) * 255
    mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(ours, mean + 0.25 * (images.float() - mean), atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_without_waiting(pictures: list[Image.Image]) -> None:
    images, params = stacked(pictures), drawn(4)[: len(pictures)]
    expected = levels(images, params)
    images, params = images.cuda(), params.cuda()
    levels(images, params)  # the constants are copied at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = levels(images, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(result.cpu(), expected, atol=0.1)


def test_the_images_stay_as_they_are(pictures: list[Image.Image]) -> None:
    images = stacked(pictures * 2)
    before = images.clone()
    augment(images, drawn(len(pictures)), IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(images, before)


def test_autocast_does_not_coarsen_the_blur(pictures: list[Image.Image]) -> None:
    images, params = stacked(pictures), rows(len(pictures), sigma=1.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = levels(images, params)
    assert torch.equal(inside, levels(images, params))


@pytest.mark.parametrize("side", [1, 5, 31, 33, 64])
def test_any_side(side: int) -> None:
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    result = levels(images, drawn(2))
    assert result.shape == images.shape
    assert result.isfinite().all()
    assert 0 <= result.min() <= result.max() <= 255.001


def test_no_images_give_no_images() -> None:
    empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    assert augment(empty, rows(1)[:0], IMAGENET_MEAN, IMAGENET_STD).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (2, 1, 8, 8), (2, 9, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 images|as many means"):
        augment(torch.zeros(shape, dtype=torch.uint8), rows(2), IMAGENET_MEAN, IMAGENET_STD)


def test_normalize_is_torchvisions(pictures: list[Image.Image]) -> None:
    images = stacked(pictures).float()
    ours = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(images, stacked(pictures).float())  # a copy is normalised
    assert torch.equal(ours, normalize(stacked(pictures), IMAGENET_MEAN, IMAGENET_STD))
    theirs = F.normalize(stacked(pictures) / 255, IMAGENET_MEAN, IMAGENET_STD)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_result_comes_in_the_requested_type(pictures: list[Image.Image]) -> None:
    images, params = stacked(pictures), rows(len(pictures), sigma=1.0)
    exact = augment(images, params, IMAGENET_MEAN, IMAGENET_STD)
    coarse = augment(images, params, IMAGENET_MEAN, IMAGENET_STD, dtype=torch.bfloat16)
    assert exact.dtype == torch.float32
    assert torch.equal(coarse, exact.bfloat16())


def test_pixels_that_lie_channels_last_are_the_same_pixels(pictures: list[Image.Image]) -> None:
    images, params = stacked(pictures), drawn(4)[: len(pictures)]
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(levels(last, params), levels(images.contiguous(), params))
