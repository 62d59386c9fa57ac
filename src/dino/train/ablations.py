"""The tables and figures of the paper's ablations as data: rows of settings, and its numbers.

A row holds what differs from `base`, DINO on a small ViT. Sizes of the paper (ViT-S/16 at 224 px,
K = 65536, batch 1024) are scaled down with it, and a row's name states the paper's. Accuracies are
ImageNet top-1 in percent of 300 epochs (Tables 8 and 9, appendices C to E: 100 where not stated).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from dino.files import UserError
from dino.train.config import (
    HeadSettings,
    ModelSettings,
    OptimSettings,
    PretrainConfig,
    TeacherSettings,
)
from dino.train.recipes import SMALL_VIEWS

Measure = Literal["knn", "linear"]


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        name: as in the paper.
        settings: what differs from `base`.
        paper: top-1 of the paper in percent; None where it prints none.
    """

    name: str
    settings: dict[str, Any]
    paper: float | None

    @property
    def collapses(self) -> bool:
        """Whether it has chance accuracy in the paper."""
        return self.paper == 0.1


@dataclass(frozen=True)
class Table:
    """A table or figure.

    Attributes:
        title: of the page.
        measure: which of the paper's numbers the rows hold; ours are always k-NN.
        rows: the first is what the others differ from.
        note: what is not as in the paper.
    """

    title: str
    measure: Measure
    rows: tuple[Row, ...]
    note: str = ""


class Network(NamedTuple):
    """A size of `base`, and the processed images a run from which on it is chosen."""

    settings: dict[str, Any]
    images: float


SMALL = {
    "model.embed_dim": 96,
    "model.depth": 4,
    "views.global_size": 32,
    "views.local_size": 16,
    "head.hidden": 256,
    "head.bottleneck": 64,
}
NETWORKS = (
    Network(SMALL, 0),
    Network({**SMALL, "model.patch_size": 4}, 5e4),
    Network({}, 3e5),
    Network({"model.depth": 12, "views.global_size": 96, "views.local_size": 48}, 2e6),
)
"""From the cheapest on; from which images on each is better is an estimate."""


def base(network: Network) -> PretrainConfig:
    """DINO with multi-crop, as row 1 of Table 7, in small."""
    config = PretrainConfig(
        model=ModelSettings(
            arch="vit_tiny", embed_dim=192, depth=6, heads=6, patch_size=8, drop_path=0.0
        ),
        head=HeadSettings(prototypes=1024, hidden=512, bottleneck=128),
        views=SMALL_VIEWS,
        teacher=TeacherSettings(
            momentum=0.99, momentum_end=0.999, temperature=0.04, temperature_warmup="0 epochs"
        ),
        optim=OptimSettings(
            lr=4e-3, warmup="10%", weight_decay_end=0.1, clip=1.0, freeze_last_layer="2%"
        ),
    )
    return config.changed({"run.batch": 32, **network.settings})


# ------------------------------------------------------------------------------- combinations
TWO_VIEWS = {"views.local_count": 0}
COPY = {"teacher.kind": "student_copy"}
SINKHORN = {"teacher.targets": "sinkhorn"}
BATCH_SOFTMAX = {"teacher.targets": "batch_softmax"}
PREDICTOR = {"head.predictor": True}
MSE = {"optim.loss": "mse"}
NO_CENTER = {"teacher.targets": "none"}
PROJECTION = {  # BYOL's and MoCo-v2's: batch norm, ReLU, no prototypes
    "head.bottleneck": None,
    "head.prototypes": 256,
    "head.batch_norm": True,
    "head.activation": "relu",
    "optim.freeze_last_layer": "0 steps",
    **NO_CENTER,
}
BYOL = {**PROJECTION, **MSE, **PREDICTOR, "head.layers": 2}
"""MSE, a head of 2 linear layers and a predictor, all with batch norm (arXiv 2006.07733)."""
MOCO = {
    **PROJECTION,
    "optim.loss": "contrastive",
    "optim.queue": 4096,
    "teacher.student_temperature": 0.2,
}
"""InfoNCE with a queue and a head of 3 linear layers of dim 256 (appendix E; arXiv 2003.04297)."""
SWAV = {**COPY, **SINKHORN}
"""No momentum and Sinkhorn-Knopp, with cross-entropy (section 5.1, Table 15)."""
CONVNET = {
    "model.arch": "resnet10t",
    "model.patch_size": None,
    "model.stem": None,
    "model.position": None,
    "model.embed_dim": None,
    "model.depth": None,
    "model.heads": None,
}


def _crops(limit: float) -> dict[str, Any]:
    return {"views.global_scale": (limit, 1.0), "views.local_scale": (0.05, limit)}


def _temperature(value: float) -> dict[str, Any]:
    return {"teacher.temperature": value, "teacher.temperature_start": value}


COMPONENTS = (
    Row("DINO", {}, 72.8),
    Row("without momentum", COPY, 0.1),
    Row("Sinkhorn-Knopp", SINKHORN, 72.2),
    Row("without multi-crop", TWO_VIEWS, 67.9),
    Row("MSE", MSE, 52.6),
    Row("with predictor", PREDICTOR, 71.8),
    Row("BYOL", {**BYOL, **TWO_VIEWS}, 66.6),
    Row("MoCo-v2", {**MOCO, **TWO_VIEWS}, 62.0),
    Row("SwAV", SWAV, 64.7),
)
FRAMEWORKS = (
    Row("DINO CE, multi-crop, centering", {}, 76.1),
    Row("MSE, multi-crop, centering", MSE, 62.4),
    Row("CE, multi-crop, centering, predictor", PREDICTOR, 75.6),
    Row("CE, centering", TWO_VIEWS, 72.5),
    Row("MoCo-v2 InfoNCE, BN", {**MOCO, **TWO_VIEWS}, 71.4),
    Row("InfoNCE, multi-crop, BN", MOCO, 73.4),
    Row("BYOL MSE, BN, predictor", {**BYOL, **TWO_VIEWS}, 71.4),
    Row("MSE, BN", {**BYOL, **TWO_VIEWS, "head.predictor": False}, 0.1),
    Row("MSE, centering", {**MSE, **TWO_VIEWS}, 52.6),
    Row("MSE, multi-crop, BN, predictor", BYOL, 64.8),
)
TEACHER_OUTPUTS = (
    Row("momentum, centering", {}, 76.1),
    Row("momentum, softmax over the batch", BATCH_SOFTMAX, 75.8),
    Row("momentum, Sinkhorn-Knopp", SINKHORN, 76.0),
    Row("centering", COPY, 0.1),
    Row("softmax over the batch", {**COPY, **BATCH_SOFTMAX}, 72.2),
    Row("Sinkhorn-Knopp (SwAV)", SWAV, 71.8),
)
TABLES = {
    "table7": Table("Table 7: components", "knn", COMPONENTS),
    "table8": Table(
        "Table 8: number of local crops",
        "linear",
        (
            Row("2 global crops", TWO_VIEWS, 72.5),
            Row("+ 2 local", {"views.local_count": 2}, 74.5),
            Row("+ 6 local", {"views.local_count": 6}, 75.9),
            Row("+ 10 local", {"views.local_count": 10}, 76.1),
        ),
    ),
    "table9": Table(
        "Table 9: batch size",
        "knn",
        tuple(
            Row(f"batch {size}", {**TWO_VIEWS, "run.batch": size // 8}, accuracy)
            for size, accuracy in ((1024, 59.9), (512, 59.6), (256, 59.1), (128, 57.9))
        ),
        "Batches are an eighth of the paper's; all rows process the same number of images.",
    ),
    "table13": Table(
        "Table 13: frameworks and architectures",
        "knn",
        (
            Row("DINO, ViT-S", {}, 72.8),
            Row("MoCo-v2, ViT-S", {**MOCO, **TWO_VIEWS}, 62.0),
            Row("BYOL, ViT-S", {**BYOL, **TWO_VIEWS}, 66.6),
            Row("SwAV, ViT-S", SWAV, 64.7),
            Row("DINO, ResNet-50", {**CONVNET, "head.batch_norm": True}, 65.6),
            Row("MoCo-v2, ResNet-50", {**CONVNET, **MOCO, **TWO_VIEWS}, 62.9),
            Row("BYOL, ResNet-50", {**CONVNET, **BYOL, **TWO_VIEWS}, 65.4),
            Row("SwAV, ResNet-50", {**CONVNET, **SWAV, "head.batch_norm": True}, 65.4),
        ),
        "The convnet is a ResNet-10 and has the optimizer of the ViT.",
    ),
    "table14": Table("Table 14: from DINO to MoCo-v2 and BYOL", "linear", FRAMEWORKS),
    "table15": Table("Table 15: operations on the teacher's output", "linear", TEACHER_OUTPUTS),
    "figure5": Table(
        "Fig. 5: patch size",
        "knn",
        (
            *(
                Row(
                    f"patches of {size}",
                    {
                        **TWO_VIEWS,
                        "model.patch_size": size,
                        "views.global_size": 80,
                        "views.local_size": 80,
                        "model.embed_dim": dim,
                        "model.heads": dim // 32,
                    },
                    accuracy,
                )
                for size, dim, accuracy in ((16, 192, 72.8), (8, 192, None), (5, 192, None))
            ),
            Row(
                "patches of 16, twice as wide",
                {
                    **TWO_VIEWS,
                    "model.patch_size": 16,
                    "views.global_size": 80,
                    "views.local_size": 80,
                    "model.embed_dim": 384,
                    "model.heads": 12,
                },
                75.1,
            ),
        ),
        "Two views of 80 px, which patches of 16, 8 and 5 divide; the paper prints numbers for "
        "patches of 16 only, the rest is in its plot.",
    ),
    "figure6": Table(
        "Fig. 6: teachers",
        "knn",
        (
            Row("momentum", {}, 72.8),
            Row("previous epoch", {"teacher.kind": "previous_epoch"}, 66.6),
            Row("previous iteration", {"teacher.kind": "previous_iteration"}, 0.1),
            Row("student copy", COPY, 0.1),
        ),
        "The teacher of the previous epoch needs runs of several epochs: until the end of the "
        "first it is the untrained network. The curves of student and teacher are not drawn.",
    ),
    "figure7": Table(
        "Fig. 7: centering and sharpening",
        "knn",
        (
            Row("both", {}, None),
            Row("sharpening only", NO_CENTER, None),
            Row("centering only", _temperature(0.1), None),
        ),
        "Without sharpening the teacher has the student's temperature, .1. The paper shows "
        "entropy and KL divergence over 100 epochs, and no accuracy.",
    ),
    "appendixb": Table("Appendix B: Tables 14 and 15", "linear", FRAMEWORKS + TEACHER_OUTPUTS[1:]),
    "appendixc": Table(
        "Appendix C: the head",
        "knn",
        (
            Row("without batch norm, GELU, K 65536", {}, 69.7),
            Row("with batch norm", {"head.batch_norm": True}, 68.6),
            Row("ReLU", {"head.activation": "relu"}, 68.9),
            *(
                Row(f"K {size}", {"head.prototypes": size // 64}, accuracy)
                for size, accuracy in ((1024, 67.8), (4096, 69.3), (16384, 69.2), (262144, 69.1))
            ),
            *(
                Row(
                    f"bottleneck, {layers} linear layers, K 4096",
                    {"head.layers": layers - 1, "head.prototypes": 64},
                    accuracy,
                )
                for layers, accuracy in ((2, 62.2), (3, 68.0))
            ),
            *(
                Row(
                    f"no bottleneck, {layers} linear layers, K 4096",
                    {"head.bottleneck": None, "head.layers": layers, "head.prototypes": 64},
                    accuracy,
                )
                for layers, accuracy in ((1, 61.6), (2, 62.9), (3, 0.1), (4, 0.1))
            ),
        ),
        "K is a 64th of the paper's.",
    ),
    "appendixd": Table(
        "Appendix D: center momentum, teacher temperature, heads",
        "knn",
        (
            Row("center momentum .9, temperature .04", {}, 69.7),
            *(
                Row(f"center momentum {value:g}", {"teacher.center_momentum": value}, accuracy)
                for value, accuracy in ((0.0, 69.1), (0.99, 69.4), (0.999, 0.1))
            ),
            *(
                Row(f"temperature {value:g}", _temperature(value), accuracy)
                for value, accuracy in ((0.0, 43.9), (0.02, 66.7), (0.06, 68.7), (0.08, 0.1))
            ),
            *(
                Row(f"{heads} heads, 300 epochs", {"model.heads": heads}, accuracy)
                for heads, accuracy in ((8, 73.1), (12, 73.7), (16, 73.8))
            ),
        ),
        "The paper compares heads after 300 epochs (6 heads: 72.8), the rest after 100; here all "
        "rows have equally many.",
    ),
    "appendixe": Table(
        "Appendix E: scale of the crops, and frameworks with multi-crop",
        "knn",
        (
            *(
                Row(f"scale {limit:g}", {"views.local_count": 6, **_crops(limit)}, accuracy)
                for limit, accuracy in (
                    *((0.24, 69.7), (0.08, 65.6), (0.16, 68.0)),
                    *((0.32, 69.8), (0.48, 69.5)),
                )
            ),
            Row("BYOL, 300 epochs", {**BYOL, **TWO_VIEWS}, 66.6),
            Row("BYOL + 6 local", {**BYOL, "views.local_count": 6}, 59.8),
            Row("SwAV, 300 epochs", {**SWAV, **TWO_VIEWS}, 60.5),
            Row("SwAV + 6 local", {**SWAV, "views.local_count": 6}, 64.7),
            Row("MoCo-v2, 300 epochs", {**MOCO, **TWO_VIEWS}, 62.0),
            Row("MoCo-v2 + 6 local", {**MOCO, "views.local_count": 6}, 65.4),
            Row("DINO, 300 epochs", TWO_VIEWS, 67.9),
            Row("DINO + 6 local", {"views.local_count": 6}, 72.7),
        ),
    ),
}
"""By the names of `dino ablate`."""


def table(name: str) -> Table:
    """The table called `name`, also spelled as "Table 7", "fig7" or "appendix-c".

    Raises:
        UserError: for an unknown name.
    """
    plain = "".join(filter(str.isalnum, name.lower()))
    plain = plain.replace("figure", "fig").replace("fig", "figure").replace("app", "appendix")
    plain = plain.replace("appendixendix", "appendix")
    if plain not in TABLES:
        near = get_close_matches(plain, TABLES, n=2)
        advice = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(TABLES)}"
        raise UserError(f"the paper's ablations have no {name!r}: {advice}")
    return TABLES[plain]


def configuration(network: Network, row: Row, seed: int) -> PretrainConfig:
    """The configuration of a row; its duration is set by the plan."""
    config = base(network).changed({**row.settings, "run.seed": seed})
    return config.for_architecture()
