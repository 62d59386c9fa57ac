"""`torch.hub.load` finds the published entry points in this repository."""

from __future__ import annotations

import importlib.util
import io
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.server import serving

import dino
from dino.weights.load import fingerprint
from dino.weights.published import CATALOGUE

REPOSITORY = Path(__file__).parents[1]
TINY: dict[str, Any] = {"embed_dim": 192, "depth": 1, "heads": 3, "patch_size": 8, "image_size": 16}


def test_entry_points() -> None:
    found = runpy.run_path(str(REPOSITORY / "hubconf.py"))
    entries = {name: value for name, value in found.items() if name.startswith("dino")}
    assert set(entries) == {p.name for p in CATALOGUE.values() if p.kind == "backbone"}
    assert "k-NN 74.5 %" in entries["dino_vits16"].__doc__
    assert "trained with DINOv2, k-NN 79.1 %" in entries["dinov2_vits14_reg"].__doc__
    assert all(importlib.util.find_spec(name) for name in found["dependencies"])


def test_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    original, buffer = dino.create("vit_tiny", **TINY), io.BytesIO()
    torch.save(original.state_dict(), buffer)
    with serving() as (address, files):
        monkeypatch.setenv("DINO_MIRROR", address)
        files.content[f"/{CATALOGUE['dino_vits8'].file}"] = buffer.getvalue()
        found = torch.hub.load(str(REPOSITORY), "dino_vits8", source="local", position="exact")
    assert fingerprint(found) == fingerprint(original)
    assert found.spec["position"] == "exact"
    assert not found.training


def test_untrained() -> None:
    options: dict[str, Any] = {"source": "local", "pretrained": False}
    found = torch.hub.load(str(REPOSITORY), "dino_vits16", depth=1, **options)
    assert (found.embed_dim, found.patch_size, found.depth) == (384, 16, 1)


def test_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.hub has only the files: the package is then found beside hubconf.py."""
    source = str(REPOSITORY / "src")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != source])
    runpy.run_path(str(REPOSITORY / "hubconf.py"))
    assert source not in sys.path
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    runpy.run_path(str(REPOSITORY / "hubconf.py"))
    assert source in sys.path
