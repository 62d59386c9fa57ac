"""Every file that the authors of DINO published: its URL, contents and accuracy.

Names and numbers are those of the published code's README (k-NN and linear: top-1 % on ImageNet).
No hash of any of these files is published: the hash of a first download is recorded beside the
file, and checked from then on (`fetch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
        sha256: its hash, where a source states it.
    """

    name: str
    file: str
    kind: Kind
    spec: dict[str, Any]
    parameters: int
    knn: float | None = None
    linear: float | None = None
    note: str = ""
    sha256: str | None = None

    @property
    def architecture(self) -> str:
        """Such as "vit_small/16"."""
        patch = self.spec.get("patch_size")
        return f"{self.spec['arch']}/{patch}" if patch else str(self.spec["arch"])


def _vit(size: str, patch: int) -> dict[str, Any]:
    return {"arch": f"vit_{size}", "patch_size": patch}


def _xcit(size: str, patch: int) -> dict[str, Any]:
    return {"arch": f"timm:xcit_{size}_p{patch}_224"}


# Name, its folder and files' stem, architecture, parameters, k-NN, linear, the name of its ONNX.
_MODELS: tuple[tuple[str, str, dict[str, Any], int, float, float, str | None], ...] = (
    ("dino_vits16", "dino_deitsmall16", _vit("small", 16), 21, 74.5, 77.0, "dino_deits16"),
    ("dino_vits8", "dino_deitsmall8", _vit("small", 8), 21, 78.3, 79.7, "dino_deits8"),
    ("dino_vitb16", "dino_vitbase16", _vit("base", 16), 85, 76.1, 78.2, "dino_vitb16"),
    ("dino_vitb8", "dino_vitbase8", _vit("base", 8), 85, 77.4, 80.1, "dino_vitb8"),
    ("dino_resnet50", "dino_resnet50", {"arch": "resnet50"}, 23, 67.5, 75.3, "dino_resnet50"),
    *(
        (f"dino_xcit_{size}_p{patch}", f"dino_xcit_{size}_p{patch}", _xcit(size, patch), *numbers)
        for size, patch, numbers in (
            ("small_12", 16, (26, 76.0, 77.8, None)),
            ("small_12", 8, (26, 77.1, 79.2, None)),
            ("medium_24", 16, (84, 76.4, 78.8, None)),
            ("medium_24", 8, (84, 77.9, 80.3, None)),
        )
    ),
)

_OTHERS = (
    Published(
        "dino_vits8_300ep",
        "dino_deitsmall8_300ep_pretrain/dino_deitsmall8_300ep_pretrain.pth",
        "backbone",
        _vit("small", 8),
        21,
        note="300 epochs: the paper's pictures of attention",
    ),
    Published(
        "dino_vits16_googlelandmark",
        "dino_vitsmall16_googlelandmark_pretrain/dino_vitsmall16_googlelandmark_pretrain.pth",
        "backbone",
        _vit("small", 16),
        21,
        note="trained on Google Landmarks v2: Table 3, ROxford 51.5 / 24.3, RParis 75.3 / 51.6",
    ),
    Published(
        "dino_vits16_k4096",
        "dino_k4096.pth",
        "full",
        _vit("small", 16),
        21,
        note="head of 4096 prototypes (issue 139); its author warns of other names of keys",
    ),
    Published(
        "dino_resnet50_100ep_full",
        "example_runs_logs/dino_rn50_checkpoint.pth",
        "full",
        {"arch": "resnet50"},
        23,
        note="100 epochs on 8 GPUs: the example run of the README",
    ),
)

_LOGS = {
    "dino_vits16_vanilla_log": "dino_vanilla_deitsmall16_log.txt",
    "dino_vits16_vanilla_linear-log": "dino_vanilla_deitsmall16_eval.txt",
    "dino_vits16_boost_log": "dino_boost_deitsmall16_log.txt",
    "dino_vits16_boost_linear-log": "dino_boost_deitsmall16_eval.txt",
    "dino_resnet50_100ep_log": "dino_rn50_log.txt",
}
"""Of the README's example runs."""


def _all() -> Iterator[Published]:
    for name, stem, spec, parameters, knn, linear, onnx in _MODELS:
        folder = f"{stem}_pretrain"
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
            full_name = name if kind == "backbone" else f"{name}_{kind}"
            yield Published(full_name, f"{folder}/{file}", kind, spec, parameters, knn, linear)
    yield from _OTHERS
    for name, file in _LOGS.items():
        spec = _vit("small", 16) if "vits16" in name else {"arch": "resnet50"}
        kind = "linear-log" if name.endswith("linear-log") else "log"
        yield Published(name, f"example_runs_logs/{file}", kind, spec, 21 if "vit" in name else 23)


CATALOGUE = {published.name: published for published in _all()}
"""By name."""
