"""Fine-tuning: its numbers, its batches, its interruptions, its ranks, its command."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ranks
from helpers.fakes import COLORS
from helpers.results import result, result_file
from PIL import Image
from torch import Tensor

import dino
from dino.data.sources.open import open_source
from dino.evaluate.classification import finetune_training as tuning
from dino.evaluate.classification import linear
from dino.evaluate.classification.deit_augmentation import (
    AugmentedBatches,
    AugmentedImages,
    Recipe,
    posterize,
    seeded,
)
from dino.evaluate.classification.finetune import CLASSIFIER, NETWORK, PRESETS, FineTune, run
from dino.evaluate.classification.finetune_training import (
    FineTunedNetwork,
    drop_path_scales,
    learning_rate,
    parameter_groups,
)
from dino.evaluate.classification.linear import Linear
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.models.create import create
from dino.runtime import Ranks, process_group
from dino.weights.load import save

timm = pytest.importorskip("timm")

PLAIN = Recipe(lr=1e-3, epochs=4, batch=4, lr_end=1e-5, mixup=0, cutmix=0, erase=0, repeats=1)


def small() -> Backbone:
    torch.manual_seed(0)
    size = {"embed_dim": 12, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 8}
    return create("vit_tiny", **size).eval()


def noise(count: int) -> list[tuple[Any, int]]:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (20 + i, 30 - i, 3), dtype=np.uint8) for i in range(count)]
    return [(Image.fromarray(one), i % 3) for i, one in enumerate(pixels)]


# ---------------------------------------------------------------------------------- numbers
def preset(name: Any) -> Recipe:
    return FineTune(weights="w", data="d", val="v", preset=name).recipe()


def test_presets_hold_the_authors_numbers() -> None:
    presets = {name: preset(name) for name in PRESETS}
    full = {name: recipe.lr * recipe.batch / 512 for name, recipe in presets.items()}
    assert full == pytest.approx({"imagenet": 1e-3, "cifar": 7.5e-6, "inat": 1e-4})
    assert {name: recipe.epochs for name, recipe in presets.items()} == {
        "imagenet": 300,
        "cifar": 1000,
        "inat": 300,
    }
    for recipe in presets.values():
        assert (recipe.weight_decay, recipe.warmup, recipe.lr_start) == (0.05, 5, 1e-6)
        assert (recipe.mixup, recipe.cutmix, recipe.smoothing) == (0.8, 1.0, 0.1)
        assert (recipe.erase, recipe.drop_path, recipe.repeats) == (0.25, 0.1, 3)
        assert recipe.policy == "rand-m9-mstd0.5-inc1"


def test_learning_rates_are_those_of_timm() -> None:
    from timm.scheduler.cosine_lr import CosineLRScheduler

    recipe = preset("imagenet")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], recipe.lr * 2)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6
    )
    for epoch in range(300):
        scheduler.step(epoch)
        assert learning_rate(recipe, epoch) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_every_parameter_is_in_one_group() -> None:
    model = FineTunedNetwork(small(), 3, 0.01, 0)
    groups = parameter_groups(model, replace(PLAIN, layer_decay=0.5))
    places = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = places[id(parameter)]
        without_decay = parameter.ndim == 1 or name.split(".")[-1] in ("cls_token", "pos_embed")
        assert group["weight_decay"] == (0 if without_decay else 0.05), name
        above = {"blocks.0": 2, "blocks.1": 1, "norm.": 0, "head.": 0}
        depth = next((n for part, n in above.items() if f".{part}" in f".{name}"), 3)
        if name.startswith("backbone.norm") or name.startswith("head"):
            depth = 0
        assert group["scale"] == 0.5**depth, name
    with pytest.raises(UserError, match="--layer-decay"):
        parameter_groups(
            FineTunedNetwork(create("resnet50"), 3, 1.0, 0), replace(PLAIN, layer_decay=0.5)
        )


def test_the_classifier_starts_small() -> None:
    wide = create("vit_small", depth=1, image_size=16)
    model, other = FineTunedNetwork(wide, 100, 0.01, 0), FineTunedNetwork(wide, 100, 1.0, 0)
    assert other.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.head.weight, 0.01 * other.head.weight)
    assert not model.head.bias.any()


def test_drop_path_grows_with_the_depth() -> None:
    backbone, recipe = small(), replace(PLAIN, drop_path=0.4, batch=64)
    scales = torch.cat(
        [drop_path_scales(backbone, recipe, 0, 0, step) for step in range(40)], dim=1
    )
    assert (scales[:2] == 1).all()
    assert scales[2:].unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert (scales[2:] == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert drop_path_scales(backbone, replace(PLAIN, drop_path=0.0), 0, 0, 0) is None
    assert drop_path_scales(create("resnet50"), recipe, 0, 0, 0) is None


# ---------------------------------------------------------------------------------- batches
def test_drawing_disturbs_nobody() -> None:
    before = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(0, 0, 0):
        first = random.random(), np.random.rand(), float(torch.rand(1))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    with seeded(0, 0, 0):
        assert (random.random(), np.random.rand(), float(torch.rand(1))) == first
    with seeded(0, 0, 1):
        assert random.random() != first[0] != before[0]


def test_pictures_are_keyed_and_repeated() -> None:
    source, backbone = open_source(noise(7)), small()

    def shown(epoch: int, **changes: Any) -> list[np.ndarray]:
        pictures = AugmentedImages(source, backbone, replace(PLAIN, **changes), 0, epoch)
        assert len(pictures) == 7
        return [np.asarray(pictures[place]) for place in (3, *range(7), 3)]

    first, again, later = shown(0), shown(0), shown(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(first[0], first[-1])
    assert not all(np.array_equal(a, b) for a, b in zip(first, later, strict=True))
    twins = AugmentedImages(open_source(noise(1) * 2), backbone, PLAIN, 0, 0)
    assert not np.array_equal(np.asarray(twins[0]), np.asarray(twins[1]))
    order = AugmentedImages(source, backbone, replace(PLAIN, repeats=3), 0, 0).indices
    assert order[0] == order[1] == order[2] != order[3] == order[5] != order[6]
    repeated = shown(0, repeats=3)[1:4]
    assert not np.array_equal(repeated[0], repeated[1])


def augmented(images: list[Any], batch: int = 4, **changes: Any) -> AugmentedBatches:
    recipe = replace(PLAIN, batch=batch, **changes)
    return AugmentedBatches(small(), open_source(images), recipe, classes=3, seed=0)


def test_the_strongest_augmentations_work() -> None:
    """At the highest magnitudes timm asks for pictures of no bits at all, which Pillow refuses."""
    strongest = replace(PLAIN, policy="rand-m10-n15-mstd0-inc1")
    pictures = AugmentedImages(open_source(noise(20)), small(), strongest, 0, 0)
    assert {pictures[place].size for place in range(len(pictures))} == {(8, 8)}
    image = Image.new("RGB", (4, 4), (255, 130, 3))
    assert posterize(image, 0).getpixel((0, 0)) == (0, 0, 0)
    assert posterize(image, 1).getpixel((0, 0)) == (128, 128, 0)
    assert posterize(image, 8) is image


def test_batches_of_an_epoch() -> None:
    batches = augmented(noise(11))
    steps = list(batches.epoch(0))
    assert len(steps) == len(batches) == 2
    for images, targets in steps:
        assert images.shape == (4, 3, 8, 8)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
        torch.testing.assert_close(targets.amax(dim=1), torch.full((4,), 0.9 + 0.1 / 3))
    for (images, targets), (other, others) in zip(batches.epoch(0), steps, strict=True):
        assert torch.equal(images, other)
        assert torch.equal(targets, others)
    with_workers = replace(batches, workers=2)
    for (images, _), (other, _) in zip(with_workers.epoch(0), steps, strict=True):
        assert torch.equal(images, other)


def test_mixing_and_erasing_are_at_work() -> None:
    plain = [targets for _, targets in augmented(noise(12)).epoch(0)]
    mixed = [targets for _, targets in augmented(noise(12), mixup=0.8, cutmix=1.0).epoch(0)]
    assert not any(torch.allclose(a, b) for a, b in zip(plain, mixed, strict=True))
    for targets in mixed:
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    clean = [images for images, _ in augmented(noise(12)).epoch(0)]
    erased = [images for images, _ in augmented(noise(12), erase=1.0).epoch(0)]
    for a, b in zip(clean, erased, strict=True):
        changed = (a != b).any(dim=1).flatten(1).float().mean(dim=1)
        assert (changed > 0).all()
        assert (changed < 0.5).all()


def test_an_unusable_image_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    images = noise(8)
    images[5] = ("no picture", 2)
    steps = list(augmented(images).epoch(0))
    assert [len(batch) for batch, _ in steps] == [4, 4]
    assert "1 of 8 images could not be used" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="no image of a batch"):
        list(augmented([("no picture", 0)] * 4).epoch(0))


# ---------------------------------------------------------------------------------- command
ENDINGS = (NETWORK, CLASSIFIER)


@pytest.fixture
def settings(tmp_path: Path, color_folder: Callable[..., Path]) -> FineTune:
    save(small(), tmp_path / "run" / "teacher.safetensors")
    return FineTune(
        weights=str(tmp_path / "run"),
        data=str(color_folder("train", 6)),
        val=str(color_folder("val", 3)),
        lr=1.0,
        epochs=4,
        batch=6,
        warmup=1,
        repeats=1,
        drop_path=0.1,
        workers=0,
        device="cpu",
    )


def test_command_tunes_saves_and_is_measured_again(
    settings: FineTune, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "head_scale": 1.0}
    content = run(replace(settings, baseline=True, epochs=12, **plain))
    printed = capsys.readouterr().out
    for word in ("trained", "untrained", "12 epochs", "9 images", "last loss"):
        assert word in printed
    folder = Path(settings.weights)
    written = result(folder, "finetune")
    assert written["finetune"] == json.loads(json.dumps(content["finetune"]))
    assert written["recipe"]["lr"] == 1.0
    assert written["recipe"]["weight_decay"] == 0.05
    rows = written["finetune"]["trained"]
    assert len(rows) == 12
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert rows[-1]["top1"] > 60
    assert written["scores"]["top-1, last epoch"]["trained"]["percent"] == rows[-1]["top1"]
    assert written["measured_images"] == 9
    assert not list(folder.rglob("*unfinished*"))

    network, classifier = (result_file(folder, "finetune", ending) for ending in ENDINGS)
    tuned = dino.load(network)
    before = dino.load(folder)
    assert all(
        not torch.equal(a, b) for a, b in zip(tuned.parameters(), before.parameters(), strict=True)
    )
    again = linear.run(
        Linear(
            weights=str(network),
            classifier=classifier,
            val=settings.val,
            workers=0,
            device="cpu",
        )
    )
    assert again["classifier"] == {name: rows[-1][name] for name in ("top1", "top5")}


def test_a_stopped_and_continued_training_equals_an_unstopped_one(
    settings: FineTune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = run(settings)
    files = [result_file(settings.weights, "finetune", ending) for ending in ENDINGS]
    expected = [path.read_bytes() for path in files]
    epoch_of, trained = AugmentedBatches.epoch, list[int]()

    def watched(self: AugmentedBatches, epoch: int) -> Any:
        if len(trained) == 2:
            trained.append(-1)
            raise KeyboardInterrupt
        trained.append(epoch)
        return epoch_of(self, epoch)

    monkeypatch.setattr(AugmentedBatches, "epoch", watched)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    assert "stopped: the same command continues after epoch 2" in capsys.readouterr().err
    assert run(settings)["finetune"] == uninterrupted["finetune"]
    assert trained == [0, 1, -1, 2, 3]
    assert [path.read_bytes() for path in files] == expected


def test_a_layer_decay_slows_the_first_layers(settings: FineTune) -> None:
    run(replace(settings, layer_decay=1e-4, epochs=2))
    before = dino.load(settings.weights).state_dict()
    after = dino.load(result_file(settings.weights, "finetune", NETWORK)).state_dict()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after}
    assert moved["norm.bias"] > 1e-4
    assert moved["blocks.1.mlp.fc2.weight"] < 1e-2 * moved["norm.bias"]
    assert moved["patch_embed.proj.weight"] < 1e-6


def on_a_rank(_: Ranks, settings: FineTune) -> Any:
    with process_group(torch.device("cpu")):
        steps = list(augmented(noise(11)).epoch(1))  # the command joins the same group later
        dropped = drop_path_scales(small(), replace(PLAIN, drop_path=0.5), 0, 1, 1)
    return run(settings)["finetune"], steps, dropped


def test_two_ranks_train_as_one(settings: FineTune, tmp_path: Path) -> None:
    """Each has half of every batch; AdamW amplifies rounding where a gradient is zero."""
    plain = {"mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "head_scale": 1.0}
    plain = replace(settings, drop_path=0.5, lr=0.05, **plain)
    alone, steps, dropped = on_a_rank(Ranks(), replace(plain, out=tmp_path / "alone.json"))
    (first, one, left), (second, other, right) = ranks.run(on_a_rank, 2, plain, joined=False)
    assert first == second
    for ours, theirs in zip(first["trained"], alone["trained"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert torch.equal(torch.cat([left, right], dim=1), dropped)
    for full, *halves in zip(steps, one, other, strict=True):
        for tensor, *parts in zip(full, *halves, strict=True):
            torch.testing.assert_close(torch.cat(parts), tensor)


def test_a_loss_that_is_not_finite_ends_the_training(
    settings: FineTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: FineTunedNetwork, images: Tensor, keep: Any) -> Tensor:
        return self.head.bias.expand(len(images), -1) * torch.nan

    monkeypatch.setattr(tuning.FineTunedNetwork, "forward", broken)
    with pytest.raises(UserError, match="not finite in epoch 1"):
        run(settings)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": 0.0}, "lr is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"layer_decay": 0.0}, "layer_decay is 0"),
        ({"erase": 1.5}, "erase is 1.5"),
        ({"forward_batch": 0}, "forward_batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"warmup": 4}, "--warmup"),
        ({"batch": 100}, "--batch"),
        ({"batch": 5}, "--batch"),
        ({"weights": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(
    settings: FineTune, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(replace(settings, **change))


def test_unlabelled_images_are_refused(
    settings: FineTune, color_folder: Callable[..., Path]
) -> None:
    flat = str(color_folder("flat", 8, {"red": COLORS["red"]}) / "red")
    for change in ({"data": flat}, {"val": flat}):
        with pytest.raises(UserError, match="needs classes"):
            run(replace(settings, **change))
