"""k-NN of networks: tables, the evaluation of the training loop, the command."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fakes import COLORS, MeanColor
from helpers.results import result, result_file
from PIL import Image

from dino.data.sources.open import open_source
from dino.evaluate.classification.knn import KNN, KNNEvaluation, measure, run, spread
from dino.evaluate.classification.knn_classifier import TEMPERATURE, Accuracy
from dino.evaluate.protocol import Evaluation
from dino.evaluate.results import collected
from dino.features.table import FeatureTable, Subset
from dino.files import UserError
from dino.models.create import create
from dino.weights.load import save


def table(labels: list[int], classes: list[str] | None) -> FeatureTable:
    """Every image's feature is the axis of its class, as named by the first letter."""
    names = classes or ["a", "b", "c", "d"]
    axes = torch.eye(4)[["abcd".index(names[label][0]) for label in labels]]
    return FeatureTable(axes, torch.tensor(labels), [""] * len(labels), classes)


def accuracies(*arguments: Any) -> dict[int, Accuracy]:
    return measure(*arguments).votes.accuracies(TEMPERATURE)


def test_classes_are_matched_by_name() -> None:
    bank = table([0, 0, 1, 1, 2], ["a", "b", "c"])
    queries = table([0, 1, 1], ["b", "c"])  # the folder of "a" is missing
    assert accuracies(bank, queries, [1])[1].top1 == 100.0
    unknown = table([0, 1, 1, 1], ["b", "d"])  # "d" is not in the bank
    assert accuracies(bank, unknown, [1])[1].top1 == 25.0


def test_without_names_the_numbers_count() -> None:
    bank = table([0, 1, 2], None)
    assert accuracies(bank, table([1, 2], None), [1])[1].top1 == 100.0


def test_without_queries_it_is_leave_one_out() -> None:
    bank = table([0, 0, 1, 1, 2], ["a", "b", "c"])
    assert accuracies(bank, None, [1])[1].top1 == 80.0  # the only "c" has no other image


def test_no_class_in_common_is_refused_before_any_features(
    weights: Path, color_folder: Callable[..., Path], mean_color: MeanColor
) -> None:
    bank = color_folder("train", 2)
    other = color_folder("other", 2, {"white": (255, 255, 255), "wood": (90, 60, 30)})
    settings = KNN(weights=str(weights), data=str(bank), queries=str(other), device="cpu")
    with pytest.raises(UserError, match="none of their classes, such as white"):
        run(settings)
    assert not (weights / "results").exists()
    with pytest.raises(UserError, match="none of their classes"):
        KNNEvaluation(open_source(bank), open_source(other))


def test_training_measures_only_queries_of_known_classes(
    color_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bank = color_folder("train", 2, {"red": COLORS["red"], "blue": COLORS["blue"]})
    evaluation = KNNEvaluation(open_source(bank), open_source(color_folder("val", 3)))
    assert evaluation.num_queries == 6
    warning = " ".join(capsys.readouterr().err.split())
    assert "3 of 9 images to classify were left out: their classes, such as green" in warning


def test_unlabelled_tables_are_refused() -> None:
    bank = table([0, 1], ["a", "b"])
    unlabelled = FeatureTable(bank.features, None, bank.paths, None)
    for pair in ((unlabelled, bank), (bank, unlabelled), (unlabelled, None)):
        with pytest.raises(UserError, match="sub-folder"):
            accuracies(*pair)


def test_evaluation_in_training(mean_color: MeanColor, color_folder: Callable[..., Path]) -> None:
    bank = open_source(color_folder("train", 4))
    evaluation: Evaluation = KNNEvaluation(bank, open_source(color_folder("val", 2)), k=(1, 3))
    assert evaluation.name == "knn"
    assert evaluation.run(mean_color) == {"k1": 100.0, "k3": 100.0}
    assert KNNEvaluation(bank, k=(1, 100)).run(mean_color).keys() == {"k1", "k11"}
    assert mean_color.training
    bank.labels = None
    with pytest.raises(UserError, match="sub-folder"):
        KNNEvaluation(bank)


def test_a_limit_takes_images_of_all_classes(color_folder: Callable[..., Path]) -> None:
    source = open_source(color_folder("train", 10))
    assert spread(source, None) is source
    assert spread(source, 30) is source
    part = spread(source, 6)
    assert isinstance(part, Subset)
    assert part.labels == [0, 0, 1, 1, 2, 2]
    assert KNNEvaluation(source, source, limit=6).queries is not None
    assert len(KNNEvaluation(source, source, limit=6).bank) == 6


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A run folder with a small network."""
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=4, image_size=8)
    save(vit, tmp_path / "run" / "teacher.safetensors")
    return tmp_path / "run"


def test_command_prints_one_table_and_writes_json(
    weights: Path, color_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bank, queries = color_folder("train", 4), color_folder("val", 2)
    settings = KNN(
        weights=str(weights),
        data=str(bank),
        queries=str(queries),
        k=(1, 50),
        baseline=True,
        workers=0,
        device="cpu",
    )
    scores = run(settings)
    assert scores.keys() == {"trained", "untrained", "pixels"}
    assert scores["pixels"][1].top1 == 100.0
    printed = capsys.readouterr().out
    for word in ("trained", "untrained", "pixels", "k = 1", "k = 12", "0.07", "6 queries"):
        assert word in printed
    assert "clipped to 12" in printed
    assert "100.0 ± 0.0" in printed
    written = result(weights, "knn")
    assert written["knn"]["pixels"]["k1"] == {"top1": 100.0, "top5": 100.0}
    assert (written["bank"], written["queries"]) == (12, 6)
    assert not written["leave_one_out"]
    assert written["settings"]["temperature"] == [0.07]
    assert written["weights"]["architecture"]["arch"] == "vit_tiny"


def test_more_networks_stand_in_the_same_table(
    weights: Path, color_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = weights.parent / "other.safetensors"
    save(create("vit_tiny", embed_dim=24, depth=1, heads=2, patch_size=4, image_size=8), other)
    bank = str(color_folder("train", 3))
    settings = KNN(weights=str(weights), data=bank, k=(1,), workers=0, device="cpu")
    found = run(replace(settings, compare=(str(other),)))
    assert found.keys() == {"trained", str(other)}
    alone = run(replace(settings, weights=str(other), out=weights / "alone.json"))
    assert found[str(other)] == alone["trained"]
    written = result(weights, "knn")
    assert written["networks"][str(other)]["architecture"]["embed_dim"] == 24


def test_several_banks_and_temperatures(
    weights: Path, color_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    banks = [str(color_folder("train", 4)), str(color_folder("other", 2))]
    settings = KNN(
        weights=str(weights),
        data=banks[0],
        banks=(banks[1],),
        queries=str(color_folder("val", 2)),
        k=(1, 3),
        temperature=(0.07, 1.0),
        workers=0,
        device="cpu",
    )
    found = run(settings)
    assert "T = 0.07, 1" in capsys.readouterr().out
    for bank in banks:
        for t in settings.temperature:
            alone = replace(settings, data=bank, banks=(), temperature=(t,))
            assert found[f"trained, {bank}, T = {t:g}"] == run(alone)["trained"]


def test_a_bank_that_is_divided_into_splits(
    weights: Path, color_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Splits are no classes: `train` is the bank, `val` the queries, `test` is not read."""
    train, val = color_folder("train", 4), color_folder("val", 2)
    (train.parent / "test").mkdir()
    settings = KNN(weights=str(weights), data=str(train), k=(1,), workers=0, device="cpu")
    found = run(replace(settings, queries=str(val)))
    capsys.readouterr()
    assert run(replace(settings, data=str(train.parent))) == found
    assert "is divided into splits" in capsys.readouterr().err


def test_confusions_are_written_and_printed(
    weights: Path, color_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    queries = color_folder("val", 2)
    (queries / "red" / "0.png").rename(queries / "blue" / "9.png")  # one mistake
    (queries / "white").mkdir()
    Image.new("RGB", (9, 9), (255, 255, 255)).save(queries / "white" / "0.png")
    settings = KNN(
        weights=str(weights),
        data=str(color_folder("train", 4)),
        queries=str(queries),
        k=(1,),
        confusion=True,
        workers=0,
        device="cpu",
    )
    score = run(settings)["trained"][1].top1
    assert "blue as red" in capsys.readouterr().out
    with result_file(weights, "knn", ".confusion.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["blue", "green", "red"]
    assert rows["blue"]["images"] == "3"
    assert rows["blue"]["taken for red"] == "1"
    assert rows["blue"]["top1"] == "66.67"
    right = sum(int(row[f"taken for {name}"]) for name, row in rows.items())
    assert score == 100 * right / 6
    content = result(weights, "knn")
    assert content["by_class"]["top1"]["green"] == 100
    assert content["left_out"] == 1  # white


def test_the_command_leaves_one_out_and_writes_to_out(
    weights: Path, color_folder: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    bank = color_folder("train", 3)
    run(
        KNN(
            weights=str(weights / "teacher.safetensors"),
            data=str(bank),
            k=(1,),
            workers=0,
            device="cpu",
            out=out,
        )
    )
    written = json.loads(out.read_text())
    assert written["leave_one_out"]
    assert written["queries"] == written["bank"] == 9
    assert written["knn"].keys() == {"trained"}


def test_the_result_is_written_before_the_table_is_printed(
    weights: Path, color_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class BrokenPipe:
        def print(self, *_: Any, **__: Any) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("dino.evaluate.command.Console", BrokenPipe)
    settings = KNN(weights=str(weights), data=str(color_folder("t", 2)), workers=0, device="cpu")
    with pytest.raises(BrokenPipeError):
        run(replace(settings, confusion=True))
    assert result(weights, "knn")["by_class"]


def test_files_that_are_no_images_are_counted(
    weights: Path, color_folder: Callable[..., Path]
) -> None:
    bank, queries = color_folder("train", 2), color_folder("val", 2)
    (bank / "red" / "film.mp4").touch()
    (queries / "red" / "film.mp4").touch()
    (queries / "red" / "notes.txt").touch()
    settings = KNN(weights=str(weights), data=str(bank), workers=0, device="cpu")
    run(replace(settings, queries=str(queries)))
    written = result(weights, "knn")
    assert written["ignored_files"] == {".mp4": 2, ".txt": 1}
    run(replace(settings, out=weights / "alone.json"))
    alone = json.loads((weights / "alone.json").read_text())
    assert alone["ignored_files"] == {".mp4": 1}


def test_shared_images_are_reported(
    weights: Path, color_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bank, queries = color_folder("train", 2), color_folder("val", 3)  # 0.png and 1.png are equal
    settings = KNN(weights=str(weights), data=str(bank), k=(1,), workers=0, device="cpu")
    run(settings)
    assert "test images" not in capsys.readouterr().out
    assert result(weights, "knn")["shared_images"]["count"] == 0
    run(replace(settings, queries=str(queries), out=weights / "both.json"))
    assert "6 of 9 test images are also training images" in capsys.readouterr().out
    shared = json.loads((weights / "both.json").read_text())["shared_images"]
    assert (shared["count"], shared["images"], shared["leave_one_out"]) == (6, 9, False)
    assert [str(queries / "red" / "0.png"), str(bank / "red" / "0.png")] in shared["examples"]


def test_results_of_other_images_are_not_replaced(
    weights: Path, color_folder: Callable[..., Path]
) -> None:
    first, second = color_folder("a/photos", 2), color_folder("b/photos", 3)
    settings = KNN(weights=str(weights), data=str(first), k=(1,), workers=0, device="cpu")
    for data in (first, second, first):
        run(replace(settings, data=str(data)))
    found = {Path(entry["path"]).name: entry["bank"] for entry in collected(weights)}
    assert found == {"knn-photos.json": 6, "knn-photos-2.json": 9}


def test_scores_state_their_standard_error(
    weights: Path, color_folder: Callable[..., Path]
) -> None:
    settings = KNN(weights=str(weights), data=str(color_folder("t", 4)), workers=0, device="cpu")
    trained = run(replace(settings, k=(11,), baseline=True))["trained"][11]
    (entry,) = collected(weights)
    assert entry["measured_images"] == trained.images == 12
    score = entry["scores"]["top-1, k = 11"]["trained"]
    assert score["percent"] == trained.top1
    share = trained.top1 / 100
    assert score["standard_error"] == pytest.approx(100 * (share * (1 - share) / 12) ** 0.5)
    assert entry["scores"]["top-1, k = 11"].keys() == {"trained", "untrained", "pixels"}


def test_a_file_of_weights_has_its_result_beside_it(
    weights: Path, color_folder: Callable[..., Path]
) -> None:
    file = weights / "teacher.safetensors"
    run(KNN(weights=str(file), data=str(color_folder("t", 2)), k=(1,), workers=0, device="cpu"))
    assert (weights / "teacher.safetensors.knn-t.json").exists()


def test_command_refuses_in_one_sentence(weights: Path, color_folder: Callable[..., Path]) -> None:
    flat = color_folder("flat", 2, {"red": COLORS["red"]}) / "red"
    with pytest.raises(UserError, match="sub-folder"):
        run(KNN(weights=str(weights), data=str(flat), device="cpu"))
    for change, sentence in (
        ({"k": (0,)}, "k is"),
        ({"k": ()}, "from 1 on"),
        ({"temperature": (0.0,)}, "temperature is"),
        ({"batch": 0}, "batch is 0"),
        ({"precision": "fp16"}, "precision is"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(replace(KNN(weights="nowhere", data="nowhere", device="cpu"), **change))
    with pytest.raises(UserError, match="nowhere"):
        run(KNN(weights="nowhere", data=str(flat), device="cpu"))
