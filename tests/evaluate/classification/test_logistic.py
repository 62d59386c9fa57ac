"""Logistic regression: the minimum of the paper's objective, its subsets and ranks, its command."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.fakes import COLORS
from helpers.results import result
from oracle import logistic as oracle
from PIL import Image
from torch import Tensor

from dino.evaluate.classification.knn_classifier import standard_error
from dino.evaluate.classification.linear_training import scores
from dino.evaluate.classification.logistic import Logistic, fit, held_out, held_out_scores, run
from dino.files import UserError
from dino.models.create import create
from dino.runtime import Ranks
from dino.weights.load import save


def problem(classes: int, count: int = 40) -> tuple[Tensor, Tensor]:
    """Unit vectors whose classes overlap."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (count,), generator=generator)
    centers = torch.randn(classes, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(centers[labels] + noise, dim=1), labels


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_it_is_the_minimum_of_the_paper_s_objective(classes: int, penalty: float) -> None:
    features, labels = problem(classes)
    found = fit(features, labels, classes, penalty, tolerance=1e-10)
    expected = oracle.fit(features, labels, classes, penalty)
    assert found.converged
    torch.testing.assert_close(found.classifier.weight, expected, rtol=1e-4, atol=1e-5)
    assert not found.classifier.bias.any()


def test_the_standard_tolerance_is_close_enough() -> None:
    features, labels = problem(4)
    found = fit(features, labels, 4, 0.1).classifier.weight
    least = oracle.objective(oracle.fit(features, labels, 4, 0.1), features, labels, 0.1)
    assert 0 <= oracle.objective(found, features, labels, 0.1) - least < 1e-6


def test_a_solver_that_stops_early_says_so() -> None:
    assert not fit(*problem(4), 4, 0.01, iterations=1).converged


def test_classes_without_an_image_are_never_predicted() -> None:
    features, labels = problem(3)
    spread = torch.tensor([1, 4, 5])[labels]
    found = fit(features, spread, 7, 0.1).classifier
    dense = fit(features, labels, 3, 0.1).classifier
    assert scores(found, features, spread) == scores(dense, features, labels)
    assert scores(found, features, torch.zeros(40, dtype=torch.int64))[0].top1 == 0


def test_one_class_is_predicted_always() -> None:
    found = fit(torch.randn(5, 3), torch.full((5,), 2), 4, 0.1).classifier
    truth = torch.tensor([2, 2, 0])
    assert scores(found, torch.randn(3, 3).double(), truth)[0].top1 == pytest.approx(200 / 3)


def test_held_out_images_leave_one_of_each_class() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    for seed in range(5):
        fitted, out = held_out(labels, 0.25, seed)
        assert sorted([*fitted.tolist(), *out.tolist()]) == list(range(7))
        assert sorted(labels[out].tolist()) == [0, 1]
    with pytest.raises(UserError, match="--holdout"):
        held_out(torch.arange(3), 0.5, 0)


def test_penalties_are_chosen_on_held_out_images() -> None:
    features, labels = problem(4)
    fitted, out = held_out(labels, 0.5, 3)
    found = held_out_scores(features, labels, 4, (0.01, 100.0), 0.5, 3)
    for score, penalty in zip(found, (0.01, 100.0), strict=True):
        weight = oracle.fit(features[fitted], labels[fitted], 4, penalty)
        right = (features[out] @ weight.T).argmax(dim=1) == labels[out]
        assert score.top1 == pytest.approx(100 * right.double().mean().item())
    assert found[0] != found[1]


@pytest.fixture
def settings(tmp_path: Path, color_folder: Callable[..., Path]) -> Logistic:
    torch.manual_seed(0)
    vit = create("vit_tiny", embed_dim=12, depth=2, heads=2, patch_size=4, image_size=8)
    save(vit, tmp_path / "run" / "teacher.safetensors")
    return Logistic(
        weights=str(tmp_path / "run"),
        data=str(color_folder("train", 6)),
        val=str(color_folder("val", 3)),
        fractions=(0.5, 1.0),
        shots=(1,),
        seeds=2,
        penalties=(1e-4, 0.1),
        workers=0,
        device="cpu",
        k=(1, 3, 100),
    )


def test_command_measures_every_subset(
    settings: Logistic, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.txt").write_text("red/0.png\nblue/1.png\n")
    found = run(replace(settings, lists=(tmp_path / "some.txt",), baseline=True, holdout=0.0))
    printed = capsys.readouterr().out
    for word in ("trained, 50 %", "untrained, 1 shot", "some.txt", "λ 0.1", "k-NN", "chosen"):
        assert word in printed
    written = result(tmp_path / "run", "logistic")
    assert written["logistic"] == json.loads(json.dumps(found["logistic"]))
    trained = written["logistic"]["trained"]
    assert {name: entry["images"] for name, entry in trained.items()} == {
        "50 %": [9, 9],
        "100 %": [18],
        "1 shot": [3, 3],
        "some.txt": [2],
    }
    half, full = trained["50 %"], trained["100 %"]
    for entry in (half["penalties"]["0.1"], half["chosen"], half["knn"]["k3"]):
        runs = entry["top1"]["runs"]
        assert len(runs) == 2
        assert entry["top1"]["mean"] == statistics.fmean(runs)
        assert entry["top1"]["deviation"] == statistics.stdev(runs)
    assert full["chosen"]["top1"]["deviation"] is None
    assert written["scores"]["top-1, 50 %"]["trained"] == {
        "percent": half["chosen"]["top1"]["mean"],
        "standard_error": standard_error(half["chosen"]["top1"]["mean"], 9),
    }
    assert written["measured_images"] == 9
    assert full["chosen"]["top1"]["mean"] == max(
        entry["top1"]["mean"] for entry in full["penalties"].values()
    )
    assert full["chosen"]["top1"]["mean"] == 100.0
    assert set(half["knn"]) == {"k1", "k3", "k9"}
    assert trained["some.txt"]["chosen"]["top1"]["mean"] <= 67  # it knows two classes of three


def test_the_penalty_is_chosen_by_held_out_images(settings: Logistic) -> None:
    entry = run(replace(settings, fractions=(1.0,), shots=(), holdout=0.5))["logistic"]["trained"]
    (penalty,) = entry["100 %"]["chosen"]["penalties"]
    assert penalty in settings.penalties
    word = f"{penalty:g}"
    assert entry["100 %"]["chosen"]["top1"] == entry["100 %"]["penalties"][word]["top1"]


def test_unusable_images_leave_the_subset(settings: Logistic) -> None:
    (Path(settings.data) / "red" / "2.png").write_bytes(b"no picture")
    found = run(replace(settings, fractions=(1.0,), shots=()))["logistic"]["trained"]
    assert found["100 %"]["images"] == [17]
    assert found["100 %"]["chosen"]["top1"]["mean"] == 100.0


def on_a_rank(here: Ranks, settings: Logistic) -> Any:
    return run(settings)["logistic"]


def test_two_ranks_give_the_numbers_of_one(settings: Logistic, tmp_path: Path) -> None:
    alone = run(replace(settings, out=tmp_path / "alone.json"))["logistic"]
    assert ranks.run(on_a_rank, 2, settings, joined=False) == [alone, alone]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"penalties": ()}, "--penalties"),
        ({"penalties": (0.0,)}, "penalties is"),
        ({"holdout": 1.0}, "holdout is 1"),
        ({"seeds": 0}, "seeds is 0"),
        ({"fractions": (1.5,)}, "fractions is"),
        ({"shots": (0,)}, "shots is"),
        ({"batch": 0}, "batch is 0"),
        ({"shots": (7,)}, "less than 7"),
        ({"lists": (Path("nowhere.txt"),)}, "nowhere.txt"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(
    settings: Logistic, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(replace(settings, **change))


def test_a_subset_without_images_to_hold_out_is_refused_before_the_features(
    settings: Logistic, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extracted(*_: Any, **__: Any) -> None:
        raise AssertionError("features were computed")

    monkeypatch.setattr("dino.evaluate.classification.logistic.extract", extracted)
    with pytest.raises(
        UserError, match=r"the subset 1 shot has one image of each class.*--holdout"
    ):
        run(replace(settings, shots=(3, 1), holdout=0.2))


def test_the_paper_s_fractions_are_only_a_default(settings: Logistic) -> None:
    def subsets(**change: Any) -> list[str]:
        return list(run(replace(settings, **change))["logistic"]["trained"])

    assert subsets(fractions=(), shots=()) == ["1 %", "10 %"]
    assert subsets(fractions=(), shots=(2, 5), holdout=0.2) == ["2 shots", "5 shots"]


def test_unlabelled_images_are_refused(
    settings: Logistic, color_folder: Callable[..., Path]
) -> None:
    flat = str(color_folder("flat", 2, {"red": COLORS["red"]}) / "red")
    for change in ({"data": flat}, {"val": flat}):
        with pytest.raises(UserError, match="logistic regression needs classes"):
            run(replace(settings, **change))


def test_images_of_unknown_classes_are_left_out_and_counted(settings: Logistic) -> None:
    other = Path(settings.val) / "white"
    other.mkdir()
    Image.new("RGB", (9, 9), (255, 255, 255)).save(other / "0.png")
    content = run(replace(settings, fractions=(1.0,), shots=()))
    assert content["images"]["left_out"] == 1
    found = content["logistic"]["trained"]
    assert found["100 %"]["chosen"]["top1"]["mean"] == 100.0
