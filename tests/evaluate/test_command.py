"""What evaluation commands share: where results go, the untrained twin, the table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dino.evaluate.command import FeatureEvaluationSettings, beside, table, write
from dino.files import UserError, cache_folder
from dino.models.create import create
from dino.weights.load import fingerprint, save

CPU = torch.device("cpu")


def test_results_lie_beside_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.touch()
    assert beside(str(tmp_path), "knn") == tmp_path / "knn.json"
    assert beside(str(file), "knn") == tmp_path / "weights.safetensors.knn.json"
    assert beside("dino_vits16", "knn") == Path("knn.json")


def test_the_untrained_twin_is_measured_only_on_request(tmp_path: Path) -> None:
    torch.manual_seed(1)
    vit = create("vit_tiny", width=12, depth=1, heads=2, patch_size=4, image_size=8)
    weights = str(tmp_path / "vit.safetensors")
    save(vit, weights)
    assert list(FeatureEvaluationSettings(weights=weights).networks(CPU)) == ["trained"]
    both = FeatureEvaluationSettings(weights=weights, baseline=True).networks(CPU)
    assert fingerprint(both["trained"]) == fingerprint(vit)
    assert both["untrained"].spec == vit.spec
    assert fingerprint(both["untrained"]) != fingerprint(vit)


def test_features_are_stored_in_the_cache_by_default(tmp_path: Path) -> None:
    assert (
        FeatureEvaluationSettings(weights="w").extraction()["store"] == cache_folder() / "features"
    )
    told = FeatureEvaluationSettings(weights="w", store=tmp_path, workers=2, precision="bf16")
    assert told.extraction() == {"store": tmp_path, "workers": 2, "precision": "bf16"}


def test_a_table_shows_names_and_numbers() -> None:
    text = io.StringIO()
    shown = table("title", ["name", "mAP"], {"trained": ["12.5"], "untrained": ["3.0"]})
    Console(file=text).print(shown)
    for word in ("title", "name", "mAP", "trained", "12.5", "untrained", "3.0"):
        assert word in text.getvalue()


def test_a_result_says_where_it_comes_from(tmp_path: Path) -> None:
    vit = create("vit_tiny", width=12, depth=1, heads=2, patch_size=4, image_size=8)
    settings = FeatureEvaluationSettings(weights=str(tmp_path))
    path = write("retrieval", {"map": 1.0}, vit, settings)
    assert path == tmp_path / "retrieval.json"
    content = json.loads(path.read_text())
    assert content["map"] == 1.0
    assert content["weights"]["architecture"]["arch"] == "vit_tiny"
    other = FeatureEvaluationSettings(weights="w", out=tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"x\.csv"):
        write("retrieval", {}, vit, other)
