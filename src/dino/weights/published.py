"""Every file that the authors of DINO published, and the backbones of DINOv2 and DINOv3.

Names, places and numbers are those of the READMEs and entry points of the published code (k-NN and
linear: top-1 % on ImageNet). Names of DINOv3's files end with the first digits of their SHA-256.
For the others no hash is published: the hash of a first download is recorded beside the file. Both
are checked (`fetch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from dino.data.images.preprocessing import Preprocessing
from dino.models.vit import SIZES

BASE = "https://dl.fbaipublicfiles.com/dino/"


@dataclass(frozen=True)
class Collection:
    """Files that were published together.

    Attributes:
        base: what their URLs begin with.
        licence: of the weights.
        terms: what is shown before a download; empty for a licence that everybody knows.
        access: the page where access has to be requested; empty if everybody may download.
    """

    base: str
    licence: str
    terms: str = ""
    access: str = ""


COLLECTIONS = {
    "dino": Collection(BASE, "Apache-2.0"),
    "dinov2": Collection("https://dl.fbaipublicfiles.com/dinov2/", "Apache-2.0"),
    "dinov3": Collection(
        "https://dl.fbaipublicfiles.com/dinov3/",
        "DINOv3 License",
        "under Meta's own DINOv3 License, which is no open-source licence: read it before you use "
        "the weights or pass on what you made with them, "
        "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
        "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/",
    ),
}
"""DINO's is the licence of the published code; the author of the weights in its issue 108: "I
believe the license covers the weights as well"."""

Kind = Literal["backbone", "full", "linear", "onnx", "args", "log", "linear-log"]
"""The teacher's backbone; student and teacher with heads; a linear classifier on ImageNet; a graph;
the arguments and metrics of the pretraining; those of the linear classifier."""

LOADABLE = ("backbone", "full")


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        name: what `--weights` and `dino weights fetch` call it.
        file: its place below the collection's base, and in the cache.
        kind: what it holds.
        spec: the arguments of `dino.create`.
        parameters: of the backbone, in millions, as published.
        knn: top-1 % of 20-NN on ImageNet, where it is published.
        linear: top-1 % of a linear classifier on ImageNet, where it is published.
        note: what else is known.
        collection: a name of `COLLECTIONS`.
        sha256: the first digits of its SHA-256, where they are published.
        preprocessing: the transform that belongs to it, if it is not that of its kind of files.
    """

    name: str
    file: str
    kind: Kind
    spec: dict[str, Any]
    parameters: int
    knn: float | None = None
    linear: float | None = None
    note: str = ""
    collection: str = "dino"
    sha256: str = ""
    preprocessing: Preprocessing | None = None

    @property
    def origin(self) -> Collection:
        """The files that it was published with."""
        return COLLECTIONS[self.collection]

    @property
    def heads(self) -> int | None:
        """The attention heads, which no official file states; None for networks without blocks."""
        known = SIZES.get(self.spec["arch"], {}).get("heads")
        heads: int | None = self.spec.get("heads", known)
        return heads

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


# ------------------------------------------------------------------------------------ successors
_SIZES: dict[str, dict[str, Any]] = {
    "vits": {"arch": "vit_small"},
    "vitb": {"arch": "vit_base"},
    "vitl": {"arch": "vit_large"},
    "vitg": {"arch": "vit_giant", "mlp": "swiglu", "mlp_ratio": 4096.5 / 1536},
    "vits_plus": {"arch": "vit_small", "mlp": "swiglu"},
    "vith_plus": {
        **{"arch": "vit_small", "embed_dim": 1280, "depth": 32, "heads": 20},
        "mlp": "swiglu",
    },
    "vit7b": {
        **{"arch": "vit_small", "embed_dim": 4096, "depth": 40, "heads": 32},
        **{"mlp": "swiglu", "mlp_ratio": 8192.5 / 4096},
    },
}
# Size, parameters in millions, then k-NN and linear without and with registers.
_DINOV2 = (
    ("vits", 22, (79.0, 81.1), (79.1, 80.9)),
    ("vitb", 86, (82.1, 84.5), (82.0, 84.6)),
    ("vitl", 304, (83.5, 86.3), (83.8, 86.7)),
    ("vitg", 1136, (83.5, 86.5), (83.7, 87.1)),
)
# Name, size, parameters in millions, the dataset, the first digits of the file's SHA-256.
_DINOV3 = (
    ("vits16", "vits", 21, "lvd1689m", "08c60483"),
    ("vits16plus", "vits_plus", 29, "lvd1689m", "4057cbaa"),
    ("vitb16", "vitb", 86, "lvd1689m", "73cec8be"),
    ("vitl16", "vitl", 303, "lvd1689m", "8aa4cbdd"),
    ("vith16plus", "vith_plus", 841, "lvd1689m", "7c1da9a5"),
    ("vit7b16", "vit7b", 6716, "lvd1689m", "a955f4ea"),
    ("vitl16", "vitl", 303, "sat493m", "eadcf0ff"),
    ("vit7b16", "vit7b", 6716, "sat493m", "a6675841"),
    ("convnext_tiny", "convnext_tiny", 28, "lvd1689m", "21b726bb"),
    ("convnext_small", "convnext_small", 49, "lvd1689m", "296db49d"),
    ("convnext_base", "convnext_base", 88, "lvd1689m", "801f2ba9"),
    ("convnext_large", "convnext_large", 196, "lvd1689m", "61fa432d"),
)
_SATELLITE = Preprocessing(
    resize=256,
    crop=256,
    mean=(0.430, 0.411, 0.296),
    std=(0.213, 0.156, 0.143),
    interpolation="bilinear",
    squash=True,
)
"""The README's transform for the weights of satellite images."""


def _successors() -> Iterator[Published]:
    for size, parameters, *accuracies in _DINOV2:
        model = f"dinov2_{size}14"
        common = {"patch_size": 14, "image_size": 518, "layer_scale": 1.0}
        for ending, parts, scores in (
            ("", {"position": "reference"}, accuracies[0]),
            ("_reg", {"position": "antialias", "registers": 4}, accuracies[1]),
        ):
            file = f"{model}/{model}{'_reg4' * bool(ending)}_pretrain.pth"
            spec = {**_SIZES[size], **common, **parts}
            yield Published(
                model + ending, file, "backbone", spec, parameters, *scores, collection="dinov2"
            )
    rotary = {"patch_size": 16, "image_size": 256, "position": "rope", "registers": 4}
    rotary |= {"layer_scale": 1.0, "key_bias": False, "norm_eps": 1e-5}
    for name, size, parameters, data, digits in _DINOV3:
        model, satellite = f"dinov3_{name}", data == "sat493m"
        yield Published(
            model + "_sat" * satellite,
            f"{model}/{model}_pretrain_{data}-{digits}.pth",
            "backbone",
            {**_SIZES[size], **rotary} if size in _SIZES else {"arch": size},
            parameters,
            note="trained on satellite images" if satellite else "",
            collection="dinov3",
            sha256=digits,
            preprocessing=_SATELLITE if satellite else None,
        )


CATALOGUE = {published.name: published for published in (*_all(), *_successors())}
"""By name."""


def advice(name: str, *, list_all: bool = False) -> str:
    """What to give instead of an unknown name: the published ones like it, or where they are."""
    if near := get_close_matches(name, CATALOGUE, n=2, cutoff=0.75):
        return f"did you mean {' or '.join(near)}?"
    if list_all:
        return "`dino weights list --all` shows the names"
    return "give a run folder, a file of weights or a name that `dino weights list` shows"
