"""Every file that the authors of DINO published: its URL, contents and accuracy.

Names and numbers are those of the published code's README (k-NN and linear: top-1 % on ImageNet).
No hash of any of these files is published: the hash of a first download is recorded beside the
file, and checked from then on (`fetch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

BASE = "https://dl.fbaipublicfiles.com/dino/"

LICENCE = "Apache-2.0"
"""Of the published code; the author of the weights in its issue 108: "I believe the license covers
the weights as well"."""

Kind = Literal["backbone", "full", "linear", "onnx", "args", "log", "linear-log"]
"""The teacher's backbone; student and teacher with heads; a linear classifier on ImageNet; a graph;
the arguments and metrics of the pretraining; those of the linear classifier."""

LOADABLE = ("backbone", "full")


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        name: what `--weights` and `dino weights fetch` call it.
        file: its place below `BASE`, and in the cache.
        kind: what it holds.
        spec: the arguments of `dino.create`.
        parameters: of the backbone, in millions, as published.
        knn: top-1 % of 20-NN on ImageNet, where it is published.
        linear: top-1 % of a linear classifier on ImageNet, where it is published.
        note: what else is known.
    """

    name: str
    file: str
    kind: Kind
    spec: dict[str, Any]
    parameters: int
    knn: float | None = None
    linear: float | None = None
    note: str = ""

    @property
    def architecture(self) -> str:
        """Such as "vit_small/16"."""
        patch = self.spec.get("patch_size")
        return f"{self.spec['arch']}/{patch}" if patch else str(self.spec["arch"])


_ARCHITECTURES: dict[str, tuple[dict[str, Any], int]] = {
    "vits16": ({"arch": "vit_small", "patch_size": 16}, 21),
    "vits8": ({"arch": "vit_small", "patch_size": 8}, 21),
    "vitb16": ({"arch": "vit_base", "patch_size": 16}, 85),
    "vitb8": ({"arch": "vit_base", "patch_size": 8}, 85),
    "resnet50": ({"arch": "resnet50"}, 23),
    "xcit_small_12_p16": ({"arch": "timm:xcit_small_12_p16_224"}, 26),
    "xcit_small_12_p8": ({"arch": "timm:xcit_small_12_p8_224"}, 26),
    "xcit_medium_24_p16": ({"arch": "timm:xcit_medium_24_p16_224"}, 84),
    "xcit_medium_24_p8": ({"arch": "timm:xcit_medium_24_p8_224"}, 84),
}
"""Architecture and parameters in millions by the name of a model, without "dino_"."""

# Model, stem of its folder and files, k-NN, linear, stem of its ONNX file.
_MODELS: tuple[tuple[str, str, float, float, str | None], ...] = (
    ("vits16", "dino_deitsmall16", 74.5, 77.0, "dino_deits16"),
    ("vits8", "dino_deitsmall8", 78.3, 79.7, "dino_deits8"),
    ("vitb16", "dino_vitbase16", 76.1, 78.2, "dino_vitb16"),
    ("vitb8", "dino_vitbase8", 77.4, 80.1, "dino_vitb8"),
    ("resnet50", "dino_resnet50", 67.5, 75.3, "dino_resnet50"),
    ("xcit_small_12_p16", "dino_xcit_small_12_p16", 76.0, 77.8, None),
    ("xcit_small_12_p8", "dino_xcit_small_12_p8", 77.1, 79.2, None),
    ("xcit_medium_24_p16", "dino_xcit_medium_24_p16", 76.4, 78.8, None),
    ("xcit_medium_24_p8", "dino_xcit_medium_24_p8", 77.9, 80.3, None),
)
_300_EPOCHS = "dino_deitsmall8_300ep_pretrain"
_LANDMARKS = "dino_vitsmall16_googlelandmark_pretrain"
_RUNS = "example_runs_logs"
_OTHERS: dict[str, tuple[Kind, str]] = {
    "dino_vits8_300ep": ("backbone", f"{_300_EPOCHS}/{_300_EPOCHS}.pth"),
    "dino_vits16_googlelandmark": ("backbone", f"{_LANDMARKS}/{_LANDMARKS}.pth"),
    "dino_vits16_k4096": ("full", "dino_k4096.pth"),
    "dino_resnet50_100ep_full": ("full", f"{_RUNS}/dino_rn50_checkpoint.pth"),
    "dino_vits16_vanilla_log": ("log", f"{_RUNS}/dino_vanilla_deitsmall16_log.txt"),
    "dino_vits16_vanilla_linear-log": ("linear-log", f"{_RUNS}/dino_vanilla_deitsmall16_eval.txt"),
    "dino_vits16_boost_log": ("log", f"{_RUNS}/dino_boost_deitsmall16_log.txt"),
    "dino_vits16_boost_linear-log": ("linear-log", f"{_RUNS}/dino_boost_deitsmall16_eval.txt"),
    "dino_resnet50_100ep_log": ("log", f"{_RUNS}/dino_rn50_log.txt"),
}
_NOTES = {
    "dino_vits8_300ep": "300 epochs: the paper's pictures of attention",
    "dino_vits16_googlelandmark": "trained on Google Landmarks v2: Table 3, ROxford 51.5 / 24.3, "
    "RParis 75.3 / 51.6",
    "dino_vits16_k4096": "head of 4096 prototypes (issue 139); its author warns of other names of "
    "keys",
    "dino_resnet50_100ep_full": "100 epochs on 8 GPUs: the example run of the README",
}


def _all() -> Iterator[Published]:
    for model, stem, knn, linear, onnx in _MODELS:
        files: dict[Kind, str] = {
            "backbone": f"{stem}_pretrain.pth",
            "full": f"{stem}_pretrain_full_checkpoint.pth",
            "linear": f"{stem}_linearweights.pth",
            "args": "args.txt",
            "log": f"{stem}_pretrain_log.txt",
            "linear-log": f"{stem}_pretrain_eval_linear_log.txt",
            **({"onnx": f"{onnx}.onnx"} if onnx else {}),
        }
        for kind, file in files.items():
            name, path = f"dino_{model}_{kind}", f"{stem}_pretrain/{file}"
            name = name.removesuffix("_backbone")
            yield Published(name, path, kind, *_ARCHITECTURES[model], knn, linear)
    for name, (kind, file) in _OTHERS.items():
        spec, parameters = _ARCHITECTURES[name.split("_")[1]]
        yield Published(name, file, kind, spec, parameters, note=_NOTES.get(name, ""))


CATALOGUE = {published.name: published for published in _all()}
"""By name."""


def advice(name: str, *, list_all: bool = False) -> str:
    """What to give instead of an unknown name: the published ones like it, or where they are."""
    if near := get_close_matches(name, CATALOGUE, n=2, cutoff=0.75):
        return f"did you mean {' or '.join(near)}?"
    if list_all:
        return "`dino weights list --all` shows the names"
    return "give a run folder, a file of weights or a name that `dino weights list` shows"
