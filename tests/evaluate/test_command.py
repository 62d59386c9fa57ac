"""What evaluation commands share: where results go, the untrained twin, the table."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from dino.data.images.pixel_format import PixelFormat
from dino.data.images.preprocessing import Preprocessing
from dino.evaluate.classification import finetune, knn, linear, logistic
from dino.evaluate.command import FeatureEvaluationSettings, evaluation_run
from dino.evaluate.results import collected
from dino.evaluate.retrieval import copies, retrieval
from dino.evaluate.segmentation import segmentation
from dino.evaluate.video import video
from dino.features import export
from dino.features.command import number_table
from dino.files import UserError, cache_folder
from dino.models.create import create
from dino.progress import Console
from dino.weights.load import fingerprint, save

CPU = torch.device("cpu")


def test_the_untrained_twin_is_measured_only_on_request(tmp_path: Path) -> None:
    torch.manual_seed(1)
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=4, image_size=8)
    weights = str(tmp_path / "vit.safetensors")
    save(vit, weights)
    assert list(FeatureEvaluationSettings(weights=weights).networks(CPU)) == ["trained"]
    both = FeatureEvaluationSettings(weights=weights, baseline=True).networks(CPU)
    assert fingerprint(both["trained"]) == fingerprint(vit)
    assert both["untrained"].spec == vit.spec
    assert fingerprint(both["untrained"]) != fingerprint(vit)


def test_features_are_stored_in_the_cache_by_default(tmp_path: Path) -> None:
    default = FeatureEvaluationSettings(weights="w").extraction()
    assert (default["store"], default["workers"]) == (cache_folder() / "features", None)
    changed = FeatureEvaluationSettings(weights="w", store=tmp_path, workers=2, precision="bf16")
    assert changed.extraction() == {"store": tmp_path, "workers": 2, "precision": "bf16"}


def test_a_table_shows_names_and_numbers() -> None:
    text = io.StringIO()
    shown = number_table("title", ["name", "mAP"], {"trained": ["12.5"], "runs/[out]": ["3.0"]})
    Console(file=text, width=80).print(shown)
    for word in ("title", "name", "mAP", "trained", "12.5", "runs/[out]", "3.0"):
        assert word in text.getvalue()


def test_a_result_says_where_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=4, image_size=8)
    training = {"recipe": "small_data", "step": 8, "steps": 500}
    save(vit, tmp_path / "run" / "teacher.safetensors", training)
    save(vit, tmp_path / "other.safetensors")
    (tmp_path / "photos").mkdir()
    settings = FeatureEvaluationSettings(
        weights="run", device="cpu", baseline=True, compare=("other.safetensors",)
    )
    scores = {"mAP": {"trained": {"percent": 1.0}}}
    with evaluation_run("retrieval", settings, "photos", None) as started:
        started.report({"map": 1.0}, "a sentence", images=3, scores=scores)
    assert capsys.readouterr().out.splitlines() == [
        "a sentence",
        "trained: teacher.safetensors, recipe small_data, step 8 of 500",
        "other.safetensors: other.safetensors",
        str(Path("run", "results", "retrieval-photos.json")),
    ]
    (content,) = collected("run")
    assert content["map"] == 1.0
    assert content["weights"]["architecture"]["arch"] == "vit_tiny"
    stated = {"evaluation": "retrieval", "data": "photos", "measured_images": 3, "scores": scores}
    assert stated.items() <= content.items()
    assert content["sources"] == [str(tmp_path / "photos")]
    assert {"file": "teacher.safetensors", **training}.items() <= content["weights"].items()
    assert training.items() <= content["networks"]["trained"].items()
    assert "recipe" not in content["networks"]["untrained"]


def test_more_networks_are_named_by_their_weights(tmp_path: Path) -> None:
    first, second, grey = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    for path, channels in ((first, 3), (second, 3), (grey, 1)):
        options: dict[str, Any] = {"embed_dim": 12, "depth": 1, "heads": 2, "patch_size": 4}
        vit = create("vit_tiny", image_size=8, channels=channels, **options)
        if channels == 1:
            vit.preprocessing = Preprocessing(mean=(0.5,), std=(0.5,), pixels=PixelFormat(1))
        save(vit, path)
    both = FeatureEvaluationSettings(weights=first, compare=(second,)).networks(CPU)
    assert list(both) == ["trained", second]
    with pytest.raises(UserError, match="twice"):
        FeatureEvaluationSettings(weights=first, compare=(second, second)).networks(CPU)
    with pytest.raises(UserError, match="takes other pixels than"):
        FeatureEvaluationSettings(weights=first, compare=(grey,)).networks(CPU)
    with pytest.raises(UserError, match="takes 1 channels"):
        FeatureEvaluationSettings(weights=grey).networks(CPU, rgb=True)


HOW: dict[str, Any] = {"weights": "nowhere", "device": "cpu"}
COMMANDS = [
    (knn.run, knn.KNN(data="nowhere", out=Path("r.txt"), **HOW)),
    (linear.run, linear.Linear(data="nowhere", val="nowhere", out=Path("r.txt"), **HOW)),
    (logistic.run, logistic.Logistic(data="nowhere", val="nowhere", out=Path("r.txt"), **HOW)),
    (finetune.run, finetune.FineTune(data="nowhere", val="nowhere", out=Path("r.txt"), **HOW)),
    (retrieval.run, retrieval.Retrieval(data="nowhere", out=Path("r.txt"), **HOW)),
    (retrieval.run, retrieval.Retrieval(benchmark="nowhere", out=Path("r.txt"), **HOW)),
    (copies.run, copies.Copies(data="nowhere", out=Path("r.txt"), **HOW)),
    (copies.run, copies.Copies(benchmark="nowhere", out=Path("r.txt"), **HOW)),
    (segmentation.run, segmentation.Segmentation(data=Path("no"), out=Path("r.txt"), **HOW)),
    (video.run, video.Video(data=Path("nowhere"), out=Path("r.txt"), **HOW)),
    (export.run, export.FeatureSettings(data="nowhere", out=Path("r.txt"), **HOW)),
]


@pytest.mark.parametrize(("run", "settings"), COMMANDS)
def test_a_wrong_destination_is_refused_before_anything_is_read(run: Any, settings: Any) -> None:
    with pytest.raises(UserError, match=r"r\.txt"):
        run(settings)
