"""Networks: sizes, shapes, equal ways to the same numbers, and refusals."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import dino
from dino.files import UserError
from dino.models.create import create
from dino.models.head import Head
from dino.models.position_embedding import resample
from dino.models.vit import ViT


def small_vit(**options: Any) -> ViT:
    torch.manual_seed(0)
    return ViT(
        **{"patch_size": 8, "embed_dim": 24, "depth": 3, "heads": 2, "image_size": 32, **options}
    )


@pytest.mark.parametrize(
    ("arch", "patch", "count"),
    [
        ("vit_tiny", 16, 5_524_416),
        ("vit_small", 16, 21_665_664),
        ("vit_small", 8, 21_670_272),
        ("vit_base", 16, 85_798_656),
        ("vit_base", 8, 85_807_872),
        ("resnet50", None, 23_508_032),
    ],
)
def test_parameter_counts_of_table_1(arch: str, patch: int | None, count: int) -> None:
    with torch.device("meta"):
        backbone = create(arch, patch_size=patch)
    assert sum(p.numel() for p in backbone.parameters()) == count


@pytest.mark.parametrize(
    ("width", "mlp"), [(192, 5_116_160), (384, 5_509_376), (768, 6_295_808), (2048, 8_917_248)]
)
def test_parameter_counts_of_the_head(width: int, mlp: int) -> None:
    with torch.device("meta"):
        head = Head(width, 65536)
    assert sum(p.numel() for p in head.mlp.parameters()) == mlp
    assert sum(p.numel() for p in head.last_layer.parameters()) == 16_777_216 + 65_536


def test_every_parameter_is_initialised() -> None:
    """Made on storage full of NaN, so that one nobody initialises cannot hide."""

    def poison(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor.fill_(float("nan"))

    vit = small_vit()
    with torch.no_grad():
        for parameter in vit.parameters():
            poison(parameter)
    vit.reset_parameters()
    assert all(torch.isfinite(p).all() for p in vit.parameters())
    weights = torch.cat([b.mlp.fc1.weight.flatten() for b in create("vit_tiny").blocks])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert vit.blocks[0].attn.qkv.bias.eq(0).all()


def test_initial_prototypes_and_mlp() -> None:
    head = Head(384, 4096)
    assert head.last_layer.weight_v.abs().max().item() <= 1 / 16
    assert head.last_layer.weight_v.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.01)
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert head.last_layer.weight_g.eq(1).all()
    assert not head.last_layer.weight_g.requires_grad
    assert Head(384, 16, fixed_norm=False).last_layer.weight_g.requires_grad
    logits = head(torch.randn(8, 384))
    assert logits.abs().max() <= 1 + 1e-6  # cosines


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    extra=st.integers(0, 7),
    patch=st.sampled_from([5, 8]),
)
def test_any_size_gives_its_grid(rows: int, columns: int, extra: int, patch: int) -> None:
    vit = small_vit(patch_size=patch, depth=1)
    images = torch.randn(2, 3, rows * patch + min(extra, patch - 1), columns * patch)
    with torch.inference_mode():
        features = vit.features(images, attention=True)
        assert features.cls.shape == (1, 2, 24)
        assert features.patches.shape == (1, 2, 24, rows, columns)
        assert features.attention is not None
        assert features.attention.shape == (2, 2, 1 + rows * columns, 1 + rows * columns)
        torch.testing.assert_close(features.attention.sum(-1), torch.ones(2, 2, 1 + rows * columns))
        torch.testing.assert_close(vit(images), features.cls[-1])


@given(trained=st.sampled_from([14, 28, 37]), rows=st.integers(2, 122), columns=st.integers(2, 122))
def test_positions_have_the_requested_grid(trained: int, rows: int, columns: int) -> None:
    patches = torch.randn(1, trained * trained, 2)
    for flavour in ("reference", "exact"):
        assert resample(patches, (trained, trained), (rows, columns), flavour).shape == (
            1,
            rows * columns,
            2,
        )


@pytest.mark.parametrize(
    ("grid", "pixels"),
    [(14, (976, 1840, 1952)), (37, (546, 602, 1092, 1204, 1610, 1722))],
)
def test_positions_at_sizes_where_plain_scale_factors_fail(
    grid: int, pixels: tuple[int, ...]
) -> None:
    for size in pixels:
        side = size // (16 if grid == 14 else 14)
        patches = torch.zeros(1, grid * grid, 1)
        assert resample(patches, (grid, grid), (side, side), "reference").shape[1] == side * side


def cubic(values: list[float], x: float) -> float:
    """Cubic convolution with a = -0.75 at coordinate x, borders repeated."""
    a, total = -0.75, 0.0
    for index in range(math.floor(x) - 1, math.floor(x) + 3):
        d = abs(x - index)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        total += values[min(max(index, 0), len(values) - 1)] * (near if d <= 1 else far)
    return total


@pytest.mark.parametrize(
    ("flavour", "out", "coordinates"),
    [
        ("reference", 6, [0.6475, 2.9426, 5.2377, 7.5328, 9.8279, 12.1230]),
        ("exact", 6, [2 / 3, 3, 16 / 3, 23 / 3, 10, 37 / 3]),
        ("reference", 20, [-0.1517, 0.5448, 1.2413, 1.9378]),
        ("exact", 20, [-0.15, 0.55, 1.25, 1.95]),
    ],
)
def test_positions_read_the_published_coordinates(
    flavour: Any, out: int, coordinates: list[float]
) -> None:
    """Coordinates of the published code for a grid of 14."""
    row = torch.randn(14, dtype=torch.float64)
    patches = row.repeat(14, 1).reshape(1, -1, 1)
    ours = resample(patches, (14, 14), (out, out), flavour)[0, :out, 0].tolist()
    expected = [cubic(row.tolist(), x) for x in coordinates]
    assert ours[: len(expected)] == pytest.approx(expected, abs=5e-4)


def test_a_grid_of_the_same_count_but_another_shape_is_resampled() -> None:
    patches = torch.randn(1, 16, 3)
    assert resample(patches, (4, 4), (4, 4), "reference") is patches
    assert not torch.equal(resample(patches, (4, 4), (2, 8), "reference"), patches)


def test_last_blocks_and_other_attention() -> None:
    vit, images = small_vit().double(), torch.randn(2, 3, 32, 24, dtype=torch.float64)
    with torch.inference_mode():
        all_blocks = vit.features(images, last=3)
        for block in range(3):
            explicit = vit.features(images, last=3, attention=block)
            torch.testing.assert_close(explicit.cls, all_blocks.cls, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(explicit.patches, all_blocks.patches, rtol=1e-10, atol=1e-12)
        same = (
            vit.features(images, attention=-1).attention,
            vit.features(images, attention=True).attention,
        )
    assert torch.equal(same[0], same[1])  # type: ignore[arg-type]
    assert not torch.equal(same[0], vit.features(images, attention=0).attention)  # type: ignore[arg-type]


def test_drop_path_multiplies_the_branch_of_each_sample() -> None:
    vit, images = small_vit(depth=2), torch.randn(2, 3, 16, 16)
    keep = torch.ones(4, 2)
    torch.testing.assert_close(vit(images, keep), vit(images))
    none = vit(images, torch.zeros(4, 2))
    torch.testing.assert_close(none, vit.norm(vit.tokens(images)[0][:, 0]))
    keep[:, 1] = 0
    mixed = vit(images, keep)
    torch.testing.assert_close(mixed[0], vit(images)[0])
    torch.testing.assert_close(mixed[1], none[1])


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"layers": 1}, [(12, 24)]),
        ({"layers": 2}, [(32, 24), (12, 32)]),
        ({"layers": 3, "batch_norm": True}, [(32, 24), (32, 32), (12, 32)]),
        ({"layers": 3, "bottleneck": None}, [(32, 24), (32, 32)]),
        ({"layers": 1, "bottleneck": None}, []),
    ],
)
def test_heads_of_appendix_c(options: dict[str, Any], shapes: list[tuple[int, int]]) -> None:
    head = Head(24, 40, **{"hidden": 32, "bottleneck": 12, **options})
    linears = [m for m in head.mlp if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in linears] == shapes
    norms = [m for m in head.mlp if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == (len(linears) - 1 if options.get("batch_norm") else 0)
    assert head(torch.randn(3, 24)).shape == (3, 40)
    plain = options.get("bottleneck", 12) is None
    assert (head.last_layer.weight_g is None) == plain
    lengths = head.embed(torch.randn(3, 24)).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(3)) == (not plain)


def test_published_key_names() -> None:
    assert set(create("vit_tiny", depth=1).state_dict()) == {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
        *(
            f"blocks.0.{p}.{w}"
            for p in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
            for w in ("weight", "bias")
        ),
    }
    assert set(Head(8, 4, hidden=4, bottleneck=2, batch_norm=True).state_dict()) >= {
        "mlp.0.weight",
        "mlp.1.running_mean",
        "mlp.3.weight",
        "mlp.4.weight",
        "mlp.6.bias",
        "last_layer.weight_g",
        "last_layer.weight_v",
    }


@pytest.mark.parametrize(
    ("arch", "embed_dim"), [("resnet10t", 512), ("resnet18", 512), ("resnet50", 2048)]
)
def test_resnet_features(arch: str, embed_dim: int) -> None:
    net, images = create(arch).eval(), torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        features = net.features(images)
        torch.testing.assert_close(net(images), features.cls[0])
    assert features.patches.shape == (1, 1, embed_dim, 2, 3)
    with pytest.raises(UserError, match="no CLS attention"):
        net.features(images, attention=True)
    with pytest.raises(UserError, match="last block only"):
        net.features(images, last=2)


@pytest.mark.parametrize(
    ("name", "width", "grid"),
    [
        ("vit_tiny_patch16_224", 192, (2, 3)),
        ("resnet18", 512, (1, 2)),
        ("convnext_atto", 320, (1, 1)),
        ("xcit_nano_12_p16_224", 128, (2, 3)),
    ],
)
def test_timm_networks_take_any_size(name: str, width: int, grid: tuple[int, int]) -> None:
    net, images = create(f"timm:{name}", image_size=64).eval(), torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        features = net.features(images)
        assert net.embed_dim == width
        torch.testing.assert_close(net(images), features.cls[0])
        assert features.patches.shape == (1, 2, width, *grid)
        assert net(torch.randn(2, 3, 64, 64)).shape == (2, width)


@pytest.mark.parametrize(
    ("arch", "options", "words"),
    [
        ("vit_huge", {}, r"unknown architecture 'vit_huge': known are vit_tiny, .*timm:vit_huge"),
        ("timm:nonsense_net", {}, "timm has no model 'nonsense_net'"),
        ("vit_tiny", {"hat": 1}, "vit_tiny has no option hat: it takes patch_size"),
        ("resnet50", {"patch_size": 8}, "resnet50 has no option patch_size"),
        ("vit_tiny", {"heads": 5}, "not a multiple of heads"),
        ("vit_tiny", {"image_size": 8}, "holds no patch"),
    ],
)
def test_what_cannot_be_built(arch: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        create(arch, **options)


def test_calls_that_no_network_supports() -> None:
    vit = small_vit()
    with pytest.raises(UserError, match="4x32 px hold no patch of 8"):
        vit(torch.randn(1, 3, 4, 32))
    with pytest.raises(UserError, match="between 1 and the 3"):
        vit.features(torch.randn(1, 3, 16, 16), last=4)
    with pytest.raises(UserError, match="there is no block 3"):
        vit.features(torch.randn(1, 3, 16, 16), attention=3)


def test_embed_reads_pictures_in_order_in_evaluation_mode(tmp_path: Any) -> None:
    random = np.random.default_rng(0)
    paths = []
    for index in range(5):
        pixels = random.integers(0, 256, (40, 30 + index, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    net = create("resnet50", image_size=32).train()
    table = net.embed(paths, batch=2)
    assert net.training
    assert table.shape == (5, 2048)
    assert table.dtype == np.float32
    with torch.inference_mode():
        third = net.eval()(net.preprocess(Image.open(paths[3]))[None])
    np.testing.assert_allclose(table[3], third[0].numpy(), rtol=1e-4, atol=1e-3)  # of up to 20
    assert net.embed([]).shape == (0, 2048)
    for one in (paths[3], str(paths[3])):
        np.testing.assert_allclose(net.embed(one), table[3:4], rtol=1e-4, atol=1e-3)


def test_embed_without_enough_memory_names_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_vit()
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 40)).save(path)
    monkeypatch.setattr(net, "forward", lambda images: torch.empty(2**62, dtype=torch.uint8))
    with pytest.raises(UserError, match="the memory does not suffice: set a smaller batch"):
        net.embed([path] * 6, batch=9)
    monkeypatch.setattr(net, "forward", lambda images: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match"):
        net.embed(path)


def test_other_packages_use_the_backbone_and_not_its_class() -> None:
    source = Path(dino.__file__).parent
    classes = re.compile(r"import.*\b(ViT|Timm|ResNet50)\b|startswith\(\"vit_")
    assert [
        path.relative_to(source)
        for path in source.rglob("*.py")
        if path.parent != source / "models" and classes.search(path.read_text())
    ] == []


def test_layers_are_counted_from_the_images_on() -> None:
    vit = small_vit()
    names = ("patch_embed.proj.bias", "cls_token", "blocks.0.norm1.bias", "blocks.2.mlp.fc1.weight")
    assert [vit.layer_index(name) for name in (*names, "norm.bias")] == [0, 0, 1, 3, 4]
    assert create("resnet50").layer_index("network.conv1.weight") == 1
