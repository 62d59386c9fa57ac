"""The paper's tables as data: every row can be trained, and holds the paper's numbers."""

from __future__ import annotations

import pytest
import torch

from dino.distillation.targets import KeyQueue, SinkhornKnopp, Targets
from dino.files import UserError
from dino.runtime import Ranks
from dino.train.ablations import BYOL, MOCO, NETWORKS, SWAV, TABLES, Row, configuration, table
from dino.train.build import build

SMALLEST = NETWORKS[0]


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_be_built_and_differs_from_the_first(name: str) -> None:
    rows = TABLES[name].rows
    first, names = configuration(SMALLEST, rows[0], 0), set()
    for row in rows:
        config = configuration(SMALLEST, row, 0)
        config.check()
        build(config, config.schedules(10, 100), torch.device("cpu"), Ranks())
        assert row is rows[0] or config.defining() != first.defining(), row.name
        for network in NETWORKS[1:]:
            configuration(network, row, 0).check()
        names.add(row.name)
    assert len(names) == len(rows)


def test_the_numbers_are_the_papers() -> None:
    """Rows of Tables 7 and 15 in order; the rows that collapse have chance accuracy."""
    assert [row.paper for row in TABLES["table7"].rows] == [
        *(72.8, 0.1, 72.2, 67.9, 52.6, 71.8, 66.6, 62.0, 64.7),
    ]
    assert [row.paper for row in TABLES["table15"].rows] == [76.1, 75.8, 76.0, 0.1, 72.2, 71.8]
    collapsing = {name: [r.name for r in t.rows if r.collapses] for name, t in TABLES.items()}
    assert {name: rows for name, rows in collapsing.items() if rows} == {
        "table7": ["without momentum"],
        "table14": ["MSE, BN"],
        "table15": ["centering"],
        "figure6": ["previous iteration", "student copy"],
        "appendixb": ["MSE, BN", "centering"],
        "appendixc": [f"no bottleneck, {n} linear layers, K 4096" for n in (3, 4)],
        "appendixd": ["center momentum 0.999", "temperature 0.08"],
    }


def test_frameworks_are_their_combinations() -> None:
    built = {}
    for name, settings in {"byol": BYOL, "moco": MOCO, "swav": SWAV}.items():
        config = configuration(SMALLEST, Row(name, settings, None), 0)
        built[name] = build(config, config.schedules(10, 100), torch.device("cpu"), Ranks())
    byol, moco, swav = built.values()
    assert (byol.loss.kind, moco.loss.kind, swav.loss.kind) == (
        *("mse", "contrastive", "cross_entropy"),
    )
    assert type(byol.targets) is Targets
    assert isinstance(moco.targets, KeyQueue)
    assert isinstance(swav.targets, SinkhornKnopp)
    assert [one.student.predictor is not None for one in built.values()] == [True, False, False]
    linear = [sum(isinstance(m, torch.nn.Linear) for m in b.student.head.mlp) for b in (byol, moco)]
    assert linear == [1, 2]  # and the last layer
    assert byol.student.head.projection == moco.student.head.projection == 256
    assert swav.schedules.momentum_at(5) == 0
    assert byol.schedules.freeze_steps == moco.schedules.freeze_steps == 0


@pytest.mark.parametrize("spelled", ["table7", "Table 7", "fig7", "Fig. 6", "appendix-C", "app D"])
def test_names_of_tables(spelled: str) -> None:
    digits = spelled.replace(" ", "").replace(".", "")[-1].lower()
    assert table(spelled).title.replace(" ", "").lower().split(":")[0].endswith(digits)


def test_unknown_tables_are_refused() -> None:
    with pytest.raises(UserError, match=r"have no 'table1': did you mean table15 or table14"):
        table("table1")
    with pytest.raises(UserError, match=r"have no 'x': known are table7"):
        table("x")
