"""The words of a command line: where positional words go, and what is said about wrong ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import tyro

from dino.arguments import find_options, parse
from dino.files import UserError
from dino.settings import Range


@dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Range(low=0, high=1)] = 0.5
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A command."""

    examples: ClassVar[dict[str, str]] = {"out": "f.npy"}

    weights: str
    data: str | None = None
    out: Path
    k: tuple[int, ...] = (1,)
    box: tuple[float, float] = (0.0, 1.0)
    mode: Literal["fast", "exact"] = "fast"
    depth: Annotated[int, Range(low=1)] | None = None
    shown: bool = False
    inner: Annotated[Inner, tyro.conf.FlagConversionOff] = field(default_factory=Inner)


def parsed(words: str) -> Settings:
    return parse(Settings, "dino x", words.split())


@pytest.mark.parametrize(
    "words",
    [
        "RUN photos --out f",
        "--out f RUN photos",
        "--weights RUN --data photos --out f",
        "--data photos RUN --out=f",
        "photos --weights=RUN --out f",
        "--no-shown RUN photos --out f",
        "RUN --out f photos --k 1",
        "--k 1 RUN photos --out f",
        "RUN --box 0 1 photos --out f",
        "RUN photos --out f --depth None",
    ],
)
def test_weights_and_data_stand_anywhere(words: str) -> None:
    assert parsed(words) == Settings(weights="RUN", data="photos", out=Path("f"))


def test_values_of_every_kind() -> None:
    given = parsed(
        "RUN --out f --k 2 -3 --box -1 .5 --mode exact --depth 4 --shown --inner.rate .1 "
        "--inner.compiled True"
    )
    assert (given.k, given.box, given.mode, given.depth) == ((2, -3), (-1.0, 0.5), "exact", 4)
    assert given.shown
    assert given.inner == Inner(0.1, compiled=True)
    assert not parsed("RUN --out f --no-shown").shown
    assert parsed("--weights=--odd --out f").weights == "--odd"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("RUN --out f --dept 3", "dino x has no option --dept: did you mean --depth?"),
        ("RUN --out f --rate 3", "did you mean --inner.rate?"),
        ("RUN --out f --zzz", "dino x has no option --zzz: its --help lists them"),
        ("RUN --out f -k 3", "no option -k"),
        ("RUN --out f --out g", "--out is given twice"),
        ("RUN a --out f b c", "b c is too much, it takes WEIGHTS DATA"),
        ("RUN a --out f --data b", "a is too much"),
        ("", "dino x needs --weights and --out: for example dino x runs/mine --out f.npy"),
        ("RUN a;b --k 3", "needs --out: for example dino x RUN 'a;b' --k 3 --out f.npy"),
        ("RUN --out", "--out has no value: it must be a path"),
        ("RUN --k 1 a b --out f", "b is too much, it takes WEIGHTS DATA"),
        ("RUN --out f --k a", "--k is 'a': it must be integers"),
        ("RUN --depth --box 1", "--depth has no value"),
        ("RUN --out f --box 1", "--box is '1': it must be 2 numbers"),
        ("RUN --out f --mode slow", "--mode is 'slow': it must be 'fast' or 'exact'"),
        ("RUN --out f --depth x", "--depth is 'x': it must be an integer of at least 1 or None"),
        ("RUN --out f --inner.compiled", "--inner.compiled has no value: it must be True or Fal"),
        ("RUN --out f --inner.rate x", "--inner.rate is 'x': it must be a number from 0 to 1"),
    ],
)
def test_each_mistake_is_one_sentence(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(words)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_by_their_names() -> None:
    found = find_options(Settings)
    assert {"weights", "inner.rate", "shown", "no-shown", "inner.compiled"} <= found.keys()
    assert "no-inner.compiled" not in found
    counts = {
        name: found[name].num_values for name in ("k", "box", "shown", "inner.compiled", "out")
    }
    assert counts == {"k": None, "box": 2, "shown": 0, "inner.compiled": 1, "out": 1}
    assert [name for name, one in found.items() if one.required] == ["weights", "out"]


def test_the_help_has_speaking_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("--help --nonsense")
    text = capsys.readouterr().out
    assert not caught.value.code
    assert "usage: dino x WEIGHTS [DATA]" in text
    assert "--depth N" in text
    assert "--out PATH" in text
    assert "--inner.rate X" in text
    assert not any(kind in text for kind in ("STR", "INT", "FLOAT", "{None}"))
