"""Maps at several checkpoints: what is stored, what stays, and how the page shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dino.files import UserError
from dino.models.attention import attention_maps
from dino.models.create import create
from dino.show.patch_pca import Basis
from dino.show.report import photographs, snapshots
from dino.show.report.run_contents import Run
from dino.show.report.snapshots import snapshots_section, take, take_missing
from dino.weights.load import load, save

VIT = {"embed_dim": 12, "depth": 1, "heads": 2, "patch_size": 4, "image_size": 8}


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "SIDE", 32)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of two images with checkpoints at steps 10 and 20."""
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(2):
        noise = generator.integers(0, 256, (24, 30 + index, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{index}.png")
    folder = tmp_path / "run"
    for step in (10, 20):
        checkpoint(folder, step)
    config = {"about": {"data": str(tmp_path / "images")}, "defining": {}, "total_steps": 50}
    (folder / "config.json").write_text(json.dumps(config))
    return Run(folder)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    torch.manual_seed(step)
    backbone = create("vit_tiny", **VIT)  # type: ignore[arg-type]
    save(backbone, folder / "teacher.safetensors")
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    for name in ("student", "teacher"):
        save_file(state, path / f"{name}.safetensors")
    save_file({"center": torch.zeros(4)}, path / "loss.safetensors")
    (path / "state.json").write_text(json.dumps({"format": 1, "step": step}))
    return path


def test_a_snapshot_holds_the_maps_of_its_checkpoint(run: Run) -> None:
    path = run.folder / "checkpoints" / "step_00000010"
    before = torch.get_rng_state()
    take(run, path)
    assert torch.equal(torch.get_rng_state(), before)
    network = load(path)
    photos, _ = photographs.photographs(str(run.about["data"]), None)
    with torch.inference_mode():
        inputs = [photo.for_network(network) for photo in photos]
        tokens = [network.features(images).patches[0, 0] for images in inputs]
    basis = Basis.fit(tokens)
    with np.load(run.folder / "snapshots" / "step_00000010.npz") as file:
        assert file["names"].tolist() == ["0.png", "1.png"]
        for number, images in enumerate(inputs):
            expected = attention_maps(network, images)[0].mean(dim=0).numpy()
            assert np.allclose(file[f"attention{number}"], expected, atol=1e-7)
            assert np.allclose(file[f"components{number}"], basis.shares(tokens[number]), atol=1e-6)


def test_snapshots_stay_when_checkpoints_go(run: Run) -> None:
    take_missing(run)
    files = {path: path.stat().st_mtime_ns for path in run.folder.glob("snapshots/*")}
    assert {path.name for path in files} == {
        *("0.jpg", "1.jpg", "step_00000010.npz", "step_00000020.npz")
    }
    checkpoint(run.folder, 30)
    (run.folder / "checkpoints" / "step_00000010" / "state.json").unlink()
    take_missing(run)
    assert all(path.stat().st_mtime_ns == changed for path, changed in files.items())
    section = snapshots_section(run)
    assert "at 3 checkpoints" in section
    captions = re.findall(r"<figcaption>([^<]*)</figcaption>", section)
    row = ["step 10", "step 20", "step 30"]
    assert captions == 2 * ["0.png", *row] + 2 * ["1.png", *row]


def test_of_too_many_every_other_one_goes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MOST", 5)
    for step in range(30, 100, 10):
        checkpoint(run.folder, step)
    take_missing(run)
    steps = sorted(int(path.stem[5:]) for path in run.folder.glob("snapshots/*.npz"))
    assert len(steps) <= 5
    assert (steps[0], steps[-1]) == (10, 90)


def test_components_keep_their_colors_between_checkpoints() -> None:
    generator = np.random.default_rng(1)
    components = [generator.random((4, 6, 3)), generator.random((5, 3, 3))]
    other = [1 - one[..., [2, 0, 1]] for one in components]
    other = [np.where([True, False, True], one, 1 - one) for one in other]
    for found, expected in zip(snapshots._turned(other, components), components, strict=True):
        assert np.allclose(found, expected)


def test_a_damaged_snapshot_is_named(run: Run) -> None:
    take_missing(run)
    path = run.folder / "snapshots" / "step_00000020.npz"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"step_00000020\.npz is damaged .*: delete it"):
        snapshots_section(run)


def test_images_that_are_gone_are_an_error_and_leave_nothing(run: Run) -> None:
    run.about["data"] = "/nowhere/at/all"
    with pytest.raises(UserError, match="/nowhere/at/all does not exist"):
        take_missing(run)
    assert not list(run.folder.glob("snapshots/*.npz"))
