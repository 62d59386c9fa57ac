"""DINO's successors and relatives give the features of the libraries that they come from.

From tensors of the native size, of others and of no square, and from a JPEG through each library's
own transform. Parameters are random and large, so that no wrong table can pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import (
    HF,
    IMAGENET,
    TIMM,
    assert_agree,
    build_hf,
    build_timm,
    hf_features,
    official,
    relative,
    timm_folder,
    with_offset,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import dino
from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.attention import attention_maps
from dino.models.head import Head
from dino.weights import key_maps, prefixes
from dino.weights.files import file_hash
from dino.weights.load import fingerprint, load, read_checkpoint


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    rough.resize((160, 128), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", quality=90)
    return tmp_path / "photo.jpg"


def sizes(kind: str) -> list[tuple[int, int]]:
    """The native size, a larger, a smaller, and one that is no square."""
    if kind == "convnext":
        return [(96, 96), (64, 96)]
    patch = 16 if kind.startswith("dinov3") else 14
    return [(patch * h, patch * w) for h, w in ((4, 4), (7, 7), (2, 3), (3, 6))]


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------ timm
@pytest.mark.parametrize("kind", TIMM)
@torch.inference_mode()
def test_timm(kind: str, tmp_path: Path, photo: Path) -> None:
    theirs = build_timm(kind)
    folder = timm_folder(tmp_path / "model", kind, theirs)
    ours = dino.load(folder)
    assert ours.origin is not None
    assert ours.origin["dialect"] == "timm"
    assert not ours.spec["arch"].startswith("timm:")
    for size in sizes(kind):
        assert_agree(ours(images(size)), theirs(images(size)))
    data = pytest.importorskip("timm.data")
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    picture = data.create_transform(**data.resolve_data_config(pretrained_cfg=config))(
        Image.open(photo)
    )
    assert torch.equal(ours.preprocess(Image.open(photo)), picture)
    assert_agree(torch.from_numpy(ours.embed([photo])), theirs(picture[None]))


@pytest.mark.parametrize("kind", ["dinov2 registers", "dinov3 plus", "convnext"])
@torch.inference_mode()
def test_bare_files_of_timm(kind: str, tmp_path: Path) -> None:
    """Without a configuration: the names tell."""
    theirs = build_timm(kind)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = load(tmp_path / "w.pth", heads=2)
    assert ours.origin is not None
    assert ours.origin["dialect"] == "timm"
    for size in sizes(kind)[:2]:
        assert_agree(ours(images(size)), theirs(images(size)))


@torch.inference_mode()
def test_timms_network_for_large_images(tmp_path: Path) -> None:
    """It is recognised on a smaller one, since 518 px would take a minute for DINOv2's giant."""
    theirs = build_timm("dinov2", img_size=294)
    folder = timm_folder(tmp_path / "model", "dinov2", theirs)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["img_size"] = 294
    (folder / "config.json").write_text(json.dumps(config))
    ours = dino.load(folder)
    assert ours.spec["image_size"] == 294
    assert_agree(ours(images((294, 294))), theirs(images((294, 294))))


@torch.inference_mode()
def test_timms_mean_of_patches_is_no_cls_token(tmp_path: Path) -> None:
    """timm pools DINOv3 by default; a folder that states so is refused, not read as CLS."""
    folder = timm_folder(tmp_path / "model", "dinov3", build_timm("dinov3"))
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["global_pool"] = "avg"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not support: depth, embed_dim, global_pool"):
        dino.load(folder)


# ------------------------------------------------------------------------------------ transformers
def hf_folder(folder: Path, kind: str, network: Any, processor: dict[str, Any]) -> Path:
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def hf_processor(kind: str) -> dict[str, Any]:
    """What the published folders hold, for small images."""
    statistics = {f"image_{name}": value for name, value in IMAGENET.items()}
    if kind.startswith("dinov3"):
        size = {"height": 64, "width": 64}
        return {"image_processor_type": "ViTImageProcessor", "size": size, **statistics}
    side = 96 if kind == "convnext" else 56
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": side + 8},
        "crop_size": {"height": side, "width": side},
        **{"do_center_crop": True, "resample": 3},
        **statistics,
    }


@pytest.mark.parametrize("kind", HF)
@torch.inference_mode()
def test_transformers(kind: str, tmp_path: Path, photo: Path) -> None:
    theirs = build_hf(kind)
    folder = hf_folder(tmp_path / "model", kind, theirs, hf_processor(kind))
    ours = dino.load(folder)
    assert ours.origin is not None
    assert ours.origin["dialect"] == "transformers"
    for size in sizes(kind):
        cls, patches = hf_features(kind, theirs, images(size))
        assert_agree(ours(images(size)), cls)
        found = ours.features(images(size)).patches[0].flatten(2).transpose(1, 2)
        assert relative(found, patches) <= 1e-5
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    picture = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    embedded = torch.from_numpy(ours.embed([photo]))
    assert_agree(embedded, hf_features(kind, theirs, picture)[0])


@pytest.mark.parametrize("kind", ["dinov2 registers", "dinov3", "dinov2 giant", "convnext"])
@torch.inference_mode()
def test_the_module_names_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = build_hf(kind)
    torch.save(theirs.state_dict(), tmp_path / "module.pth")
    ours = load(tmp_path / "module.pth", heads=2)
    assert ours.origin is not None
    assert ours.origin["dialect"] == "transformers5"
    native = sizes(kind)[0]
    assert_agree(ours(images(native)), hf_features(kind, theirs, images(native))[0])


@pytest.mark.parametrize("kind", ["dinov2 registers", "dinov3 plus"])
@torch.inference_mode()
def test_attention_of_transformers(kind: str, tmp_path: Path) -> None:
    """Matrix, rows and maps, which leave out registers."""
    theirs = build_hf(kind)
    theirs.save_pretrained(tmp_path / "model")
    theirs.set_attn_implementation("eager")
    height, width = sizes(kind)[3]
    expected = theirs(images((height, width)), output_attentions=True).attentions
    ours = dino.load(tmp_path / "model")
    prefix, patch = 1 + ours.registers, ours.patch_size or 0
    grid = (height // patch, width // patch)
    for block in (0, 1):
        found = ours.features(images((height, width)), attention=block)
        assert found.attention is not None
        torch.testing.assert_close(found.attention, expected[block], rtol=0, atol=1e-6)
        assert found.attention_maps.shape == (2, 2, *grid)
        assert torch.equal(found.attention_maps.flatten(2), found.attention[:, :, 0, prefix:])
        assert found.key_maps.shape == (2, 32, *grid)
        rows = ours.attention_rows(images((height, width)), [0, prefix, prefix + 4], block)
        chosen = expected[block][:, :, [0, prefix, prefix + 4]]
        torch.testing.assert_close(rows, chosen, rtol=0, atol=1e-6)
        for query, token in ((None, 0), ((1, 2), prefix + grid[1] + 2)):
            maps = attention_maps(ours, images((height, width)), block, query)
            row = expected[block][:, :, token, prefix:].unflatten(2, grid)
            torch.testing.assert_close(maps, row, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------ official
@pytest.mark.parametrize("kind", TIMM)
@torch.inference_mode()
def test_official_files(kind: str, tmp_path: Path, photo: Path) -> None:
    theirs = build_timm(kind)
    torch.save(official(kind, theirs), tmp_path / "w.pth")
    ours = load(tmp_path / "w.pth", heads=2)
    assert ours.origin is not None
    assert ours.origin["dialect"] == "official"
    offset = kind.startswith("dinov2") and "registers" not in kind
    for size in sizes(kind):
        network = with_offset(theirs, *size) if offset else theirs
        assert_agree(ours(images(size)), network(images(size)))
    readme = Preprocessing(256, 256, interpolation="bilinear", squash=True)
    assert ours.preprocessing == (Preprocessing() if kind.startswith("dinov2") else readme)
    picture = ours.preprocess(Image.open(photo))[None]
    network = with_offset(theirs, 224, 224) if offset else theirs
    assert_agree(torch.from_numpy(ours.embed([photo])), network(picture))


@pytest.mark.parametrize("kind", TIMM)
def test_these_files_are_official_ones(kind: str) -> None:
    """timm's own conversion of official files reads them: names and layouts are not ours alone."""
    theirs = build_timm(kind)
    models = pytest.importorskip("timm.models")
    module = {"dinov2": "vision_transformer", "dinov3": "eva", "convnext": "convnext"}
    convert = getattr(models, module[kind.split()[0]]).checkpoint_filter_fn
    flat = {prefixes.without_chunks(n): t for n, t in official(kind, theirs).items()}
    found = convert(dict(flat), theirs)
    expected = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(found, strict=True)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@torch.inference_mode()
def test_positions_of_37_by_37(tmp_path: Path) -> None:
    """DINOv2 as it was published: learned for 518 px, used at other sizes."""
    theirs = build_timm("dinov2", img_size=518)
    torch.save(official("dinov2", theirs), tmp_path / "w.pth")
    ours = load(tmp_path / "w.pth", heads=2)
    assert ours.spec["image_size"] == 518
    for size in ((518, 518), (224, 224), (224, 336), (98, 154)):
        picture = images(size)[:1]
        assert_agree(ours(picture), with_offset(theirs, *size)(picture))


@torch.inference_mode()
def test_biases_of_keys_that_are_masked_have_no_effect(tmp_path: Path) -> None:
    tensors = official("dinov3 bias", build_timm("dinov3 bias"))
    torch.save(tensors, tmp_path / "w.pth")
    ours = load(tmp_path / "w.pth")
    assert ours.spec["key_bias"] is False
    tensors["blocks.0.attn.qkv.bias_mask"] = torch.ones(96)
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(UserError, match="bias_mask masks something else than the keys"):
        load(tmp_path / "w.pth")


# ------------------------------------------------------------------------------------ wrong tables
def swapped(table: dict[Any, Any], one: str, other: str) -> dict[Any, Any]:
    """A table in which the keys that name `one` and `other` go to each other's place."""
    return {
        theirs: ours.replace(one, "?").replace(other, one).replace("?", other)
        for theirs, ours in table.items()
    }


def gates(table: dict[Any, Any]) -> dict[Any, Any]:
    return {
        keys[::-1] if isinstance(keys, tuple) and len(keys) == 2 else keys: ours
        for keys, ours in table.items()
    }


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("dinov2 registers", lambda table: swapped(table, "ls{}", "LS")),
        ("dinov2 giant", lambda table: swapped(table, "norm{}", "NORM")),
        ("dinov3 plus", gates),
    ],
)
@torch.inference_mode()
def test_wrong_tables_are_noticed(
    kind: str,
    mistake: Callable[[dict[Any, Any]], dict[Any, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of these loads strictly, every shape fits, and the features are wrong."""
    theirs = build_hf(kind)
    theirs.save_pretrained(tmp_path / "model")

    def wrong(layout: key_maps.Layout) -> key_maps.Layout:
        if mistake is gates:
            return replace(layout, table=gates(layout.table))
        numbered = "blocks.{}.ls{}.gamma" if "registers" in kind else "blocks.{}.norm{}.{}"
        table: dict[Any, Any] = {}
        for keys, ours in layout.table.items():
            if ours == numbered:
                for number, other in (("1", "2"), ("2", "1")):
                    table[_numbered(str(keys), number)] = _numbered(numbered, other)
            table[keys] = ours
        return replace(layout, table=table)

    layouts = tuple(wrong(layout) for layout in key_maps.LAYOUTS)
    monkeypatch.setattr(key_maps, "LAYOUTS", layouts)
    monkeypatch.setattr(prefixes, "LAYOUTS", layouts)
    native = images(sizes(kind)[0])
    ours = dino.load(tmp_path / "model")
    with pytest.raises(AssertionError):
        assert_agree(ours(native), hf_features(kind, theirs, native)[0])


def _numbered(pattern: str, number: str) -> str:
    """A pattern whose `norm{}`, `ls{}` or `layer_scale{}` has one number."""
    for word in ("norm", "ls", "layer_scale"):
        pattern = pattern.replace(f".{word}{{}}", f".{word}{number}")
    return pattern


@pytest.mark.parametrize("mistake", ["antialias", "periods", "key bias", "registers"])
@torch.inference_mode()
def test_other_mistakes_are_noticed(mistake: str, tmp_path: Path) -> None:
    kind = "dinov2 registers" if mistake in ("antialias", "registers") else "dinov3 plus"
    theirs = build_hf(kind)
    theirs.save_pretrained(tmp_path / "model")
    ours: Any = dino.load(tmp_path / "model")
    if mistake == "antialias":
        ours.position = "exact"
    elif mistake == "periods":
        ours.rope_embed.periods *= 1.01
    elif mistake == "key bias":
        ours.blocks[0].attn.qkv.__class__ = torch.nn.Linear
        ours.blocks[0].attn.qkv.bias[32:64] = 1
    else:
        ours.register_tokens[:, 0] *= 1.1
    smaller = images(sizes(kind)[2])
    with pytest.raises(AssertionError):
        assert_agree(ours(smaller), hf_features(kind, theirs, smaller)[0])


# ------------------------------------------------------------------------------------ containers
TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 24}


def tiny(seed: int = 0, **parts: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(dino.create("vit_tiny", **TINY, **parts).state_dict())


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def between(word: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`word` after each block, as wrappers of single blocks put it."""
    return {
        name.replace("blocks.0.", f"blocks.0.{word}.").replace("blocks.1.", f"blocks.1.{word}."): t
        for name, t in tensors.items()
    }


HEAD = {"projector.0.weight": torch.zeros(4, 24), "classifier.bias": torch.zeros(4)}


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda t: between("_checkpoint_wrapped_module", t), id="checkpointing"),
        pytest.param(
            lambda t: below("_fsdp_wrapped_module.", between("_fsdp_wrapped_module._orig_mod", t)),
            id="fsdp and compile",
        ),
        pytest.param(lambda t: below("module._orig_mod.", t), id="ddp and compile"),
        pytest.param(lambda t: below("_orig_mod.module.", t), id="compile and ddp"),
        pytest.param(lambda t: below("model.module.", t), id="ddp in a module"),
        pytest.param(lambda t: {"state_dict": {**below("backbone.vit.", t), **HEAD}}, id="lightly"),
        pytest.param(
            lambda t: {
                "state_dict": {
                    **below("student_backbone.", tiny(1)),
                    **below("teacher_backbone.", t),
                    **below("student_head.layers.0.", {"weight": torch.zeros(3, 3)}),
                }
            },
            id="lightly's DINO",
        ),
        pytest.param(
            lambda t: {
                "state_dict": {
                    **below("student_embedding_model.wrapped_model._model.", tiny(1)),
                    **below("teacher_embedding_model.wrapped_model._model.", t),
                },
                "epoch": 3,
            },
            id="lightly-train",
        ),
        pytest.param(
            lambda t: {
                "state_dict": {
                    **below("momentum_backbone.", tiny(1)),
                    **below("backbone.", t),
                    **HEAD,
                },
                "global_step": 7,
            },
            id="solo-learn",
        ),
        pytest.param(
            lambda t: {
                "state_dict": {
                    **below("module.base_encoder.", t),
                    **below("module.base_encoder.head.0.", {"weight": torch.zeros(3, 24)}),
                    **below("module.momentum_encoder.", tiny(1)),
                    **below("module.predictor.0.", {"weight": torch.zeros(3, 3)}),
                }
            },
            id="MoCo-v3",
        ),
        pytest.param(
            lambda t: {
                "state_dict": {
                    **below("module.encoder_q.", t),
                    **below("module.encoder_k.", tiny(1)),
                    "module.queue": torch.zeros(4, 4),
                }
            },
            id="MoCo",
        ),
        pytest.param(
            lambda t: {
                "model": {
                    **t,
                    "mask_token": torch.zeros(1, 1, 24),
                    "decoder_blocks.0.attn.qkv.weight": torch.zeros(6, 2),
                    "decoder_pos_embed": torch.zeros(1, 10, 2),
                }
            },
            id="MAE with its decoder",
        ),
        pytest.param(
            lambda t: {
                "state_dict": {
                    **below("backbone.", t),
                    "backbone.masked_embed": HEAD["classifier.bias"],
                }
            },
            id="iBOT",
        ),
        pytest.param(lambda t: {**t, "head.weight": torch.zeros(5, 24)}, id="DeiT"),
    ],
)
def test_containers(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    tensors = tiny()
    torch.save(wrap(tensors), tmp_path / "w.pth")
    found = load(tmp_path / "w.pth", heads=2)
    small = dino.create("vit_tiny", **TINY)
    small.load_state_dict(tensors)
    assert fingerprint(found) == fingerprint(small)


def test_the_networks_of_a_training_of_dinov2(tmp_path: Path) -> None:
    """Student and teacher, chunked, with two heads each, as its FSDP checkpoints name them."""
    networks = {}
    for seed, name in enumerate(("student", "teacher")):
        tensors = tiny(seed, layer_scale=0.5, registers=2)
        chunked = {
            n.replace("blocks.1.", "blocks.0.1.").replace("blocks.0.n", "blocks.0.0.n"): t
            for n, t in tensors.items()
        }
        chunked = {
            n.replace("blocks.0.a", "blocks.0.0.a")
            .replace("blocks.0.m", "blocks.0.0.m")
            .replace("blocks.0.ls", "blocks.0.0.ls"): t
            for n, t in chunked.items()
        }
        torch.manual_seed(seed)
        head = Head(24, 16, hidden=20, bottleneck=8).state_dict()
        networks |= below(f"{name}.backbone.", chunked)
        networks |= below(f"{name}.dino_head.", head) | below(f"{name}.ibot_head.", head)
        assert f"{name}.backbone.blocks.0.1.ls1.gamma" in networks
        assert f"{name}.backbone.blocks.0.0.ls1.gamma" in networks
    torch.save({"model": networks, "iteration": 12}, tmp_path / "w.pth")
    checkpoint = read_checkpoint(tmp_path / "w.pth", heads=2)
    for seed, state in enumerate((checkpoint.student, checkpoint.teacher)):
        assert state is not None
        assert state.head is not None
        assert state.head.options["prototypes"] == 16
        expected = tiny(seed, layer_scale=0.5, registers=2)
        assert state.backbone.keys() == expected.keys()
        assert all(torch.equal(state.backbone[name], tensor) for name, tensor in expected.items())
    assert "ibot_head" in " ".join(checkpoint.notes)


def test_the_training_of_ibot(tmp_path: Path) -> None:
    """DINO's checkpoint with a mask token, a second last layer for patches, another loss."""
    made = {}
    for seed, (name, prefix) in enumerate((("student", "module."), ("teacher", ""))):
        torch.manual_seed(seed)
        head = Head(24, 16, hidden=20, bottleneck=8).state_dict()
        patches = {f"last_layer2.weight_{part}": head[f"last_layer.weight_{part}"] for part in "gv"}
        backbone = below("backbone.", {**tiny(seed), "masked_embed": torch.zeros(1, 24)})
        made[name] = below(prefix, {**backbone, **below("head.", {**head, **patches})})
    center = {"center": torch.randn(1, 16), "center2": torch.randn(1, 1, 16)}
    torch.save({**made, "ibot_loss": center, "epoch": 800}, tmp_path / "checkpoint.pth")
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth", heads=2)
    assert checkpoint.center is not None
    assert torch.equal(checkpoint.center, center["center"].flatten())
    for state in (checkpoint.student, checkpoint.teacher):
        assert state is not None
        assert state.head is not None
        assert state.head.tensors.keys() == head.keys()
    assert "last_layer2.weight_g, last_layer2.weight_v" in " ".join(checkpoint.notes)


def test_the_other_network_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = {**below("module.encoder_q.", tiny()), **below("module.encoder_k.", tiny(1))}
    torch.save({"state_dict": both}, tmp_path / "w.pth")
    read = load(tmp_path / "w.pth", heads=2)
    assert "module.encoder_q was read, not module.encoder_k of the same file" in caplog.text
    other = load(tmp_path / "w.pth", heads=2, network="module.encoder_k")
    assert torch.equal(read.cls_token, both["module.encoder_q.cls_token"])
    assert torch.equal(other.cls_token, both["module.encoder_k.cls_token"])
    with pytest.raises(UserError, match=r"module.encoder_q, module.encoder_k$"):
        load(tmp_path / "w.pth", heads=2, network="ema")


def test_a_file_of_very_many_networks(tmp_path: Path) -> None:
    tensors = {f"n{index}.layer1.0.conv1.weight": torch.zeros(1) for index in range(3_000)}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="no network that dino knows"):
        load(tmp_path / "w.safetensors")


def test_what_lies_beside_a_network_is_listed(tmp_path: Path) -> None:
    torch.save({"state_dict": {**below("backbone.", tiny()), **HEAD}}, tmp_path / "w.pth")
    notes = " ".join(read_checkpoint(tmp_path / "w.pth", heads=2).notes)
    assert "classifier.bias, projector.0.weight" in notes


@pytest.mark.parametrize("missing", ["backbone.norm.bias", "backbone.blocks.1.mlp.fc2.weight"])
def test_nothing_below_a_prefix_may_be_missing(missing: str, tmp_path: Path) -> None:
    tensors = below("backbone.", tiny())
    del tensors[missing]
    torch.save({"state_dict": {**tensors, **HEAD}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"missing {missing.removeprefix('backbone.')}"):
        load(tmp_path / "w.pth", heads=2)


# ------------------------------------------------------------------------------------ several files
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_several_files(ending: str, tmp_path: Path) -> None:
    theirs, folder = build_hf("dinov2"), tmp_path / "model"
    if ending == "safetensors":
        theirs.save_pretrained(folder, max_shard_size="20KB")
        index = folder / "model.safetensors.index.json"
    else:
        theirs.save_pretrained(folder)
        tensors = sorted(load_file(folder / "model.safetensors").items())
        (folder / "model.safetensors").unlink()
        index, place = folder / "pytorch_model.bin.index.json", {}
        for part in range(2):
            name = f"pytorch_model-{part}.bin"
            torch.save(dict(tensors[part::2]), folder / name)
            place |= dict.fromkeys(dict(tensors[part::2]), name)
        index.write_text(json.dumps({"weight_map": place}))
    assert len(list(folder.glob(f"*.{ending}"))) > 1
    found = dino.load(folder)
    native = images((56, 56))
    with torch.inference_mode():
        assert_agree(found(native), theirs(native).last_hidden_state[:, 0])
    assert found.origin is not None
    hashed = found.origin["file_sha256"]
    shard = sorted(folder.glob(f"*.{ending}"))[1]
    content = json.loads(index.read_text())
    content["weight_map"] = {n: f for n, f in content["weight_map"].items() if f != shard.name}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"missing |it lacks |no network that dino knows"):
        dino.load(folder)
    assert file_hash(index) != hashed
    shard.unlink()
    content["weight_map"]["more"] = shard.name
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{shard.name} is missing, which {index.name} names"):
        dino.load(folder)
    other = next(file for file in content["weight_map"].values() if file != shard.name)
    content["weight_map"]["more"] = other
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"does not hold the tensors that .* states \(more\)"):
        dino.load(folder)
    content["weight_map"]["more"] = "../elsewhere.bin"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="names files outside its folder"):
        dino.load(folder)


def test_a_distributed_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / "ckpt" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"distributed checkpoint .* join it first"):
        load(tmp_path / "ckpt")


# ------------------------------------------------------------------------------------ refusals
def test_refusals_name_what_is_there(tmp_path: Path) -> None:
    def refused(changes: dict[str, Tensor | None]) -> str:
        tensors = {n: t for n, t in {**tiny(), **changes}.items() if t is not None}
        torch.save(tensors, tmp_path / "w.pth")
        with pytest.raises(UserError) as caught:
            load(tmp_path / "w.pth", heads=2)
        return str(caught.value)

    norm = torch.zeros(24)
    assert "a ViT with a norm before its blocks, as CLIP's" in refused({"norm_pre.weight": norm})
    pooled = refused({"fc_norm.weight": norm, "norm.weight": None, "norm.bias": None})
    assert "whose feature is the mean of its patches" in pooled
    assert "own for CLS" in refused({"cls_norm.weight": norm})
    for kind in ("beit", "clip_vision_model", "siglip_vision_model", "swin"):
        folder = tmp_path / kind
        folder.mkdir()
        torch.save(tiny(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UserError, match=f"is transformers' {kind}, which is none of dino's"):
            load(folder)
