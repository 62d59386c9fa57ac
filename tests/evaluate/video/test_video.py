"""`dino evaluate video`: masks, scores, reuse of finished sequences, and the animation."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fakes import PatchColors
from helpers.videos import PALETTE, frame, write_davis
from PIL import Image

from dino.data.images.masks import Mask, read_mask
from dino.evaluate.video import scoring
from dino.evaluate.video.davis import Clip, open_davis
from dino.evaluate.video.overlay import color_of, overlaid
from dino.evaluate.video.scoring import Scores, measure, summary
from dino.evaluate.video.tracking import Tracking
from dino.evaluate.video.video import Video, run
from dino.files import UserError
from dino.models.create import create
from dino.weights.load import save

SMALL = Tracking(size=32, radius=2)


def scores_of(clip: Clip, folder: Path, how: Tracking = SMALL, weights: str = "w") -> Scores:
    return measure(PatchColors().eval(), weights, clip, folder, how, lambda count: None)


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Videos that were tracked; instead of a network, the truth moved as each frame says."""
    names: list[str] = []

    def truth(backbone: Any, clip: Clip, how: Tracking) -> Iterator[Mask]:
        names.append(clip.name)
        for path in clip.masks:
            yield read_mask(path)

    monkeypatch.setattr(scoring, "track", truth)
    return names


def test_the_truth_scores_everything(tmp_path: Path, tracked: list[str]) -> None:
    clip = open_davis(write_davis(tmp_path / "data", {"two": [1, 2]}))[0]
    scores = scores_of(clip, tmp_path / "out")
    assert scores.keys() == {"1", "2"}
    for per_measure in scores.values():
        for name in ("J", "F"):
            assert per_measure[name] == {"mean": 100, "recall": 100, "decay": 0}
    for path in clip.masks:
        written = tmp_path / "out/two" / path.name
        assert np.array_equal(read_mask(written).ids, read_mask(path).ids)
        assert list(read_mask(written).palette or ()) == PALETTE[:768]


def test_scores_leave_out_the_first_and_last_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = open_davis(write_davis(tmp_path / "data", {"one": [1]}))[0]

    def wrong_at(places: set[int]) -> Any:
        def track(*_: Any) -> Iterator[Mask]:
            for time, path in enumerate(clip.masks):
                mask = read_mask(path)
                yield Mask(np.zeros_like(mask.ids), mask.palette) if time in places else mask

        return track

    monkeypatch.setattr(scoring, "track", wrong_at({4}))
    assert scores_of(clip, tmp_path / "a")["1"]["J"]["mean"] == 100
    monkeypatch.setattr(scoring, "track", wrong_at({1}))
    assert scores_of(clip, tmp_path / "b")["1"]["J"]["mean"] == pytest.approx(200 / 3)
    assert scores_of(clip, tmp_path / "b")["1"]["F"]["mean"] == pytest.approx(200 / 3)


def test_finished_sequences_are_reused_until_something_changes(
    tmp_path: Path, tracked: list[str]
) -> None:
    root = write_davis(tmp_path / "data", {"one": [1]})
    clip, out = open_davis(root)[0], tmp_path / "out"
    first = scores_of(clip, out)
    assert scores_of(clip, out) == first
    assert len(tracked) == 1
    scores_of(clip, out, Tracking(size=16))
    scores_of(clip, out, Tracking(size=16), weights="others")
    assert len(tracked) == 3
    (out / "one/00002.png").unlink()  # a mask is gone
    scores_of(clip, out, Tracking(size=16), weights="others")
    assert len(tracked) == 4
    (out / "one.json").write_text("{")  # stopped while it was written
    scores_of(clip, out, Tracking(size=16), weights="others")
    assert len(tracked) == 5


def test_an_interrupted_sequence_is_not_finished(
    tmp_path: Path, tracked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, out = open_davis(write_davis(tmp_path / "data", {"one": [1]}))[0], tmp_path / "out"
    scores_of(clip, out)
    with monkeypatch.context() as patched:

        def stops(*_: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(scoring, "write_mask", stops)
        with pytest.raises(KeyboardInterrupt):
            scores_of(clip, out, Tracking(size=16))
    scores_of(clip, out)
    assert len(tracked) == 3


def test_the_mean_is_over_objects_not_over_videos() -> None:
    def scored(j: float, f: float) -> dict[str, dict[str, float]]:
        return {name: {"mean": x, "recall": x, "decay": 0} for name, x in (("J", j), ("F", f))}

    found = summary({"a": {"1": scored(90, 60)}, "b": {"1": scored(0, 0), "2": scored(30, 90)}})
    assert found["J"]["mean"] == pytest.approx(40)
    assert found["F"]["mean"] == pytest.approx(50)
    assert found["J&F"] == pytest.approx(45)
    assert summary({"a": {}}) == {}


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(1)
    vit = create("vit_tiny", embed_dim=12, depth=1, heads=2, patch_size=4, image_size=16)
    save(vit, tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


def test_the_command(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_davis(tmp_path / "davis", {"one": [1], "two": [1, 2]}, frames=4)
    for path in sorted((root / "Annotations/480p/one").iterdir())[1:]:
        path.unlink()  # nothing to compare with
    settings = Video(
        weights=weights,
        data=root,
        size=32,
        baseline=True,
        overlay="gif",
        out=tmp_path / "result.json",
        device="cpu",
    )
    found = run(settings)
    assert found.keys() == {"trained", "untrained"}
    assert found["trained"]["sequences"]["one"] == {}
    two = found["trained"]["sequences"]["two"]
    assert found["trained"]["J"]["mean"] == pytest.approx(
        (two["1"]["J"]["mean"] + two["2"]["J"]["mean"]) / 2
    )
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["video"] == found
    assert content["settings"]["radius"] == 12
    assert content["scores"]["J&F"]["trained"] == {"percent": found["trained"]["J&F"]}
    assert content["images"] == {"sequences": 2, "frames": 8}
    assert content["networks"]["trained"]["sha256"] == content["weights"]["sha256"]
    assert content["networks"]["untrained"]["sha256"] != content["weights"]["sha256"]
    rows = list(csv.DictReader((tmp_path / "result.csv").read_text().splitlines()))
    assert [(row["network"], row["sequence"], row["object"]) for row in rows] == [
        (name, "two", number) for name in ("trained", "untrained") for number in "12"
    ]
    assert float(rows[0]["J mean"]) == pytest.approx(two["1"]["J"]["mean"], abs=1e-4)
    for name in ("trained", "untrained"):
        for sequence in ("one", "two"):
            masks = sorted((tmp_path / "result" / name / sequence).iterdir())
            assert [path.name for path in masks] == [f"{time:05}.png" for time in range(4)]
            with Image.open(tmp_path / "result" / name / f"{sequence}.gif") as animation:
                assert animation.n_frames == 4  # type: ignore[attr-defined]
                assert animation.size == (40, 32)
    printed = capsys.readouterr().out
    assert "all objects" in printed
    assert "2 sequences, 8 frames" in printed
    assert f"{found['trained']['J&F']:.1f}" in printed


def test_other_weights_stand_beside(tmp_path: Path, weights: str) -> None:
    other = create("vit_tiny", embed_dim=16, depth=1, heads=2, patch_size=8, image_size=16)
    save(other, tmp_path / "other.safetensors")
    beside = str(tmp_path / "other.safetensors")
    root = write_davis(tmp_path / "davis", {"one": [1]}, frames=3)
    settings = Video(
        weights=weights,
        data=root,
        size=32,
        compare=(beside,),
        out=tmp_path / "r.json",
        device="cpu",
    )
    assert run(settings).keys() == {"trained", beside}
    assert len([path for path in (tmp_path / "r").iterdir() if path.is_dir()]) == 2
    with pytest.raises(UserError, match="twice"):
        run(Video(**{**vars(settings), "compare": (beside, beside)}))


def test_a_result_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, tracked: list[str]
) -> None:
    root = write_davis(tmp_path / "davis", {"one": [1]})
    with pytest.raises(UserError, match="--out"):
        run(Video(weights="none", data=root, out=tmp_path / "r.txt"))
    assert not tracked


def test_objects_are_laid_over_in_their_colors() -> None:
    ids = np.zeros((6, 6), dtype=np.uint8)
    ids[1:5, 1:5] = 1
    mask = Mask(ids, (0, 0, 0, 200, 100, 0))
    found = np.asarray(overlaid(Image.new("RGB", (6, 6), (0, 0, 100)), mask))
    assert found[5, 5].tolist() == [0, 0, 100]
    assert found[2, 2].tolist() == [100, 50, 50]
    assert found[0, 2].tolist() == [200, 100, 0]  # its lower neighbour is the object
    assert [color_of(Mask(ids), number) for number in (1, 2, 3, 8)] == [
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (64, 0, 0),
    ]
    assert frame(0, [1]).any()
