"""The linear probe: its features, its crops, its ranks, its interruptions, its command."""

from __future__ import annotations

import json
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
from oracle import linear as oracle
from PIL import Image
from torchvision.transforms import functional as F

from dino.data.images.decode import to_tensor
from dino.data.sources.open import Source, open_source
from dino.data.views.random_streams import draw_views, generator
from dino.evaluate.classification import linear
from dino.evaluate.classification import linear_training as probe
from dino.evaluate.classification.feature_batches import CropBatches, RandomCrops, TableBatches
from dino.evaluate.classification.knn_classifier import standard_error
from dino.evaluate.classification.linear import Linear, run
from dino.evaluate.classification.linear_classifier import Sweep
from dino.evaluate.classification.linear_training import Accuracy, Layers, layers_of
from dino.evaluate.epoch_checkpoint import EpochCheckpoint
from dino.features.table import FeatureTable
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.models.create import create
from dino.runtime import Ranks
from dino.weights.load import save


def small(seed: int = 0, depth: int = 2) -> Backbone:
    torch.manual_seed(seed)
    size = {"embed_dim": 12, "depth": depth, "heads": 2, "patch_size": 4, "image_size": 8}
    return create("vit_tiny", **size).eval()


@pytest.fixture
def weights(tmp_path: Path) -> str:
    save(small(), tmp_path / "run" / "teacher.safetensors")
    return str(tmp_path / "run")


@pytest.fixture
def settings(weights: str, color_folder: Callable[..., Path]) -> Linear:
    return Linear(
        weights=weights,
        data=str(color_folder("train", 5)),
        val=str(color_folder("val", 3)),
        mode="cached",
        rates=(0.1, 10.0, 1e3),
        epochs=4,
        batch=4,
        workers=0,
        device="cpu",
    )


# ---------------------------------------------------------------------------------- features
def test_the_paper_s_features_of_each_architecture() -> None:
    shape = {"depth": 6, "image_size": 32}
    assert layers_of(create("vit_small", **shape)) == Layers(4, False)
    assert layers_of(create("vit_base", **shape)) == Layers(1, True)
    assert layers_of(create("resnet50")) == Layers(1, False)
    assert layers_of(small()) == Layers(2, False)  # it has no more
    assert layers_of(create("vit_base", **shape), blocks=4) == Layers(4, False)
    assert layers_of(create("vit_small", **shape), average=True) == Layers(1, True)
    assert layers_of(create("vit_small", **shape), 3, True) == Layers(3, True)


@torch.no_grad()
def test_features_stand_one_after_the_other() -> None:
    backbone, images = small(), torch.randn(3, 3, 8, 8)
    found = Layers(2, True)(backbone, images)
    parts = backbone.features(images, last=2)
    assert found.shape == (3, 36)
    torch.testing.assert_close(found[:, 12:24], backbone(images))
    torch.testing.assert_close(found[:, :12], parts.cls[0])
    torch.testing.assert_close(found[:, 24:], parts.patches[1].flatten(2).mean(dim=2))


# ---------------------------------------------------------------------------------- batches
def noise(count: int) -> list[tuple[Image.Image, int]]:
    random = np.random.default_rng(0)
    shapes = [(20 + 3 * i, 31 - i, 3) for i in range(count)]
    pixels = [random.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    return [(Image.fromarray(one), i % 3) for i, one in enumerate(pixels)]


def test_crops_are_those_of_torchvision() -> None:
    images = noise(5)
    for epoch in (0, 3):
        crops = RandomCrops(open_source(images), 16, seed=7, epoch=epoch)
        for index, (image, _) in enumerate(images):
            random = generator(7, epoch, index)
            (view,) = draw_views([crops.spec], image.height, image.width, random)
            bilinear = F.InterpolationMode.BILINEAR
            expected = F.resized_crop(image, *view.box, [16, 16], bilinear)
            expected = F.hflip(expected) if view.flip else expected
            difference = to_tensor(expected).int() - crops[index].int()
            assert difference.abs().max() <= 1
    assert crops.spec.scale == (0.08, 1.0)
    assert crops.spec.flip == 0.5


def from_crops(source: Source, batch: int = 4, **how: Any) -> CropBatches:
    return CropBatches(small(), Layers(1, False), source, batch=batch, seed=0, **how)


def flat(batches: CropBatches | TableBatches, epoch: int) -> list[tuple[list[float], int]]:
    steps = list(batches.epoch(epoch))
    assert len(steps) == len(batches)
    return [
        (row.tolist(), int(label))
        for features, labels in steps
        for row, label in zip(features, labels, strict=True)
    ]


def test_every_image_once_an_epoch_and_an_odd_last_batch() -> None:
    table = FeatureTable(torch.arange(10.0)[:, None], torch.arange(10), [""] * 10, None)
    one = TableBatches(table, 4, 0, torch.device("cpu"))
    assert [len(labels) for _, labels in one.epoch(0)] == [4, 4, 2]
    for epoch in (0, 1):
        rows = flat(one, epoch)
        assert sorted(label for _, label in rows) == list(range(10))
        assert all(row == [label] for row, label in rows)
    assert flat(one, 0) != flat(one, 1)
    assert flat(one, 0) == flat(one, 0)


def test_crops_do_not_depend_on_how_they_are_computed() -> None:
    source = open_source(noise(11))
    expected = flat(from_crops(source, forward_batch=64), 2)
    assert len(expected) == 11
    for how in ({"forward_batch": 1}, {"forward_batch": 3}, {"forward_batch": 4, "workers": 2}):
        for (row, label), (expected_row, expected_label) in zip(
            flat(from_crops(source, **how), 2), expected, strict=True
        ):
            assert label == expected_label
            assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-5)
    assert flat(from_crops(source), 0) != flat(from_crops(source), 1)


def test_an_unusable_image_is_left_out_of_its_step(capsys: pytest.CaptureFixture[str]) -> None:
    images: list[Any] = noise(9)
    images[4] = ("no picture", 1)
    batches = from_crops(open_source(images), batch=2, forward_batch=3)
    labels = [label for _, label in flat(batches, 0)]
    assert sorted(labels) == sorted(i % 3 for i in range(9) if i != 4)
    assert "1 of 9 images could not be used" in " ".join(capsys.readouterr().err.split())


def on_a_rank(here: Ranks, settings: Linear) -> list[Any]:
    found = run(settings)
    steps = list(from_crops(open_source(noise(11)), batch=5).epoch(1))
    return [found["linear"], [(features.tolist(), labels.tolist()) for features, labels in steps]]


def test_two_ranks_give_the_numbers_of_one(settings: Linear, tmp_path: Path) -> None:
    Path(settings.data or "", "red", "0.png").unlink()  # steps of 4, 4, 4 and 2; 9 test images
    settings = replace(settings, mode="augmented", forward_batch=3, batch=5)
    results = ranks.run(on_a_rank, 2, settings, joined=False)
    alone = on_a_rank(Ranks(), replace(settings, out=tmp_path / "alone.json"))
    for of_rank in results:
        for ours, theirs in zip(of_rank[0]["trained"], alone[0]["trained"], strict=True):
            assert ours["top1_by_epoch"] == pytest.approx(theirs["top1_by_epoch"])
    assert result(tmp_path / "run", "linear")


# ---------------------------------------------------------------------------------- training
def test_the_loop_is_the_published_one() -> None:
    """Rates times batch / 256, one cosine step an epoch, scores after every epoch."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    table = FeatureTable(features, torch.arange(50) % 3, [""] * 50, None)
    batches = TableBatches(table, 16, 3, torch.device("cpu"))
    sweep = Sweep(5, 3, (0.5, 20.0), dtype=torch.float64)
    start = sweep.weight[0].clone()

    def evaluate() -> list[Accuracy]:
        return probe.scores(sweep, features, table.labels)

    history = probe.train(sweep, batches, evaluate, epochs=4, batch=16)
    assert len(history) == 4
    assert history[-1] == evaluate()
    epochs = [list(batches.epoch(epoch)) for epoch in range(4)]
    for place, rate in enumerate((0.5, 20.0)):
        alone = oracle.train(start, epochs, rate * 16 / 256)
        torch.testing.assert_close(sweep.weight[place], alone.weight.detach())
        right = (alone(features).argmax(dim=1) == table.labels).double().mean()
        assert history[-1][place].top1 == pytest.approx(100 * right.item())


def test_a_stopped_and_continued_training_equals_an_unstopped_one(
    settings: Linear, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = run(settings)
    path = result_file(settings.weights, "linear", ".safetensors")
    expected = path.read_bytes()
    path.unlink()
    trained: list[int] = []
    epoch_of = TableBatches.epoch

    def watched(self: TableBatches, epoch: int) -> Any:
        if len(trained) == 2:
            trained.append(-1)
            raise KeyboardInterrupt
        trained.append(epoch)
        return epoch_of(self, epoch)

    monkeypatch.setattr(TableBatches, "epoch", watched)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    assert "stopped: the same command continues after epoch 2" in capsys.readouterr().err
    again = run(settings)
    assert trained == [0, 1, -1, 2, 3]
    assert again["linear"] == uninterrupted["linear"]
    assert path.read_bytes() == expected
    assert not list(Path(settings.weights).rglob("*unfinished*"))


def test_another_training_does_not_continue_it(
    settings: Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EpochCheckpoint, "delete", lambda self: None)
    run(settings)
    found: list[int] = []
    read = EpochCheckpoint.read

    def watched(self: EpochCheckpoint) -> Any:
        tensors, history = read(self)
        found.append(len(history))
        return tensors, history

    monkeypatch.setattr(EpochCheckpoint, "read", watched)
    run(settings)
    run(replace(settings, workers=1))
    run(replace(settings, seed=1))
    Image.new("RGB", (9, 9)).save(Path(settings.data or "") / "red" / "new.png")
    run(replace(settings, seed=1))
    assert found == [4, 4, 0, 0]


# ---------------------------------------------------------------------------------- command
def test_command_trains_saves_and_measures_again(
    settings: Linear, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(replace(settings, baseline=True))
    printed = capsys.readouterr().out
    for word in ("trained, 0.1", "untrained", "last epoch", "best epoch", "9 images", "2 block(s)"):
        assert word in printed
    folder = Path(settings.weights)
    written = result(folder, "linear")
    assert written["linear"] == json.loads(json.dumps(content["linear"]))
    assert written["images"] == {"train": 15, "val": 9, "left_out": 0, "ignored_files": {}}
    assert written["features"] == {"blocks": 2, "average": False}
    assert written["settings"]["epochs"] == 4
    rows = written["linear"]["trained"]
    assert [row["rate"] for row in rows] == [0.1, 10.0, 1e3]
    chosen = next(row for row in rows if row["rate"] == written["chosen"]["trained"])
    assert chosen["last"]["top1"] == max(row["last"]["top1"] for row in rows) > 50
    scores = written["scores"]["top-1, last epoch"]
    assert scores["trained"]["percent"] == chosen["last"]["top1"]
    assert scores["trained"]["standard_error"] == standard_error(chosen["last"]["top1"], 9)
    assert scores.keys() == {"trained", "untrained"}
    for row in rows:
        assert row["best"]["top1"] == max(row["top1_by_epoch"])
        assert row["top1_by_epoch"][row["best"]["epoch"] - 1] == row["best"]["top1"]
        assert row["top1_by_epoch"][-1] == row["last"]["top1"]

    classifier = result_file(folder, "linear", ".safetensors")
    again = run(replace(settings, data=None, classifier=classifier, out=folder / "again.json"))
    assert again["classifier"] == chosen["last"]
    other = folder / "other" / "teacher.safetensors"
    save(small(seed=1), other)
    with pytest.raises(UserError, match="other weights"):
        run(replace(settings, weights=str(other), data=None, classifier=classifier))


def test_classes_are_matched_by_name(settings: Linear, color_folder: Callable[..., Path]) -> None:
    run(replace(settings, epochs=60))
    some = color_folder("some", 2, {"green": COLORS["green"], "red": COLORS["red"]})
    unknown = color_folder("odd", 2, {"red": COLORS["red"], "white": (255, 255, 255)})
    classifier = result_file(settings.weights, "linear", ".safetensors")
    measured = replace(settings, data=None, classifier=classifier)
    assert run(replace(measured, val=str(some)))["classifier"]["top1"] == 100
    partly = run(replace(measured, val=str(unknown)))
    assert partly["classifier"]["top1"] == 100
    assert partly["images"] == {"val": 2, "left_out": 2, "ignored_files": {}}
    other = color_folder("other", 2, {"white": (255, 255, 255), "wood": (90, 60, 30)})
    for change in ({}, {"data": settings.data, "classifier": None}):
        with pytest.raises(UserError, match="none of their classes, such as white"):
            run(replace(measured, val=str(other), **change))


def test_published_classifiers_are_measured(settings: Linear, tmp_path: Path) -> None:
    tensors = {"module.linear.weight": torch.randn(3, 24), "module.linear.bias": torch.zeros(3)}
    torch.save({"state_dict": tensors}, tmp_path / "l.pth")
    measured = replace(settings, data=None, classifier=tmp_path / "l.pth", val=str(settings.data))
    assert run(measured)["images"] == {"val": 15, "left_out": 0, "ignored_files": {}}
    with pytest.raises(UserError, match="takes 24 numbers, the features have 12"):
        run(replace(measured, blocks=1))
    torch.save({"state_dict": {k: v[:2] for k, v in tensors.items()}}, tmp_path / "l.pth")
    with pytest.raises(UserError, match=r"has 2 classes without names, .* has 3"):
        run(measured)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": None}, "--data"),
        ({"classifier": Path("c.safetensors")}, "--classifier"),
        ({"data": None, "classifier": Path("c"), "baseline": True}, "--baseline"),
        ({"rates": ()}, "--rates"),
        ({"rates": (0.1, 0.0)}, "rates is"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch": 0}, "^batch is 0"),
        ({"forward_batch": 0}, "forward_batch is 0"),
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"workers": -1}, "workers is -1"),
        ({"weights": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(
    settings: Linear, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(replace(settings, **change))


def test_unlabelled_images_are_refused(settings: Linear, color_folder: Callable[..., Path]) -> None:
    flat_folder = str(color_folder("flat", 2, {"red": COLORS["red"]}) / "red")
    for change in ({"data": flat_folder}, {"val": flat_folder}):
        with pytest.raises(UserError, match="a linear classifier needs classes"):
            run(replace(settings, **change))


def test_one_class_and_few_images(settings: Linear, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\ntrain/red/0.png,red\ntrain/red/1.png,red\n")
    listed = str(tmp_path / "list.csv")
    found = run(replace(settings, data=listed, val=listed))["linear"]["trained"]
    assert all(row["last"] == {"top1": 100.0, "top5": 100.0} for row in found)
    assert linear.RATES[0] == 1e-4
