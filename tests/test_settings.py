"""Settings are validated against their annotations: every kind of value and of mistake."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from dino.files import UserError
from dino.settings import Form, Range, parsed, validated


@dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Range(low=0, high=1)] = 0.5
    name: Literal["adamw", "sgd"] = "adamw"


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Range(low=1)] = 1
    maybe: Annotated[int, Range(low=1)] | None = None
    flag: bool = False
    pair: Annotated[tuple[float, float], Range(above=0, high=1)] = (0.1, 1.0)
    many: tuple[int, ...] | None = ()
    text: Annotated[str, Form(r"[0-9]+ steps?", "a number of steps")] = "1 step"
    path: Path | None = None
    where: str = ""
    anything: Any = None
    scores: dict[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("name", "value", "converted"),
    [
        ("count", np.int64(3), 3),
        ("maybe", None, None),
        ("maybe", torch.tensor(7), 7),
        ("flag", np.bool_(True), True),
        ("pair", [1, np.float64(0.5)], (1.0, 0.5)),
        ("many", [1, 2, 3], (1, 2, 3)),
        ("many", None, None),
        ("text", np.str_("5 steps"), "5 steps"),
        ("path", "a/b", Path("a/b")),
        ("where", Path("a/b"), "a/b"),
        ("anything", object, object),
        ("scores", {"k": 1}, {"k": 1.0}),
        ("inner", Inner(rate=1), Inner(rate=1.0)),
    ],
)
def test_valid_values_are_converted(name: str, value: Any, converted: Any) -> None:
    found = getattr(validated(Outer(**{name: value})), name)
    assert found == converted
    assert type(found) is type(converted)


def test_settings_that_need_no_conversion_are_not_copied() -> None:
    settings = Outer(many=(1, 2), inner=Inner(rate=0.25))
    assert validated(settings) is settings


def nested(**changes: Any) -> Outer:
    return Outer(inner=Inner(**changes))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Outer(count="8"), r"count is '8': it must be an integer of at least 1"),  # type: ignore[arg-type]
        (Outer(count=8.0), r"count is 8.0: it must be an integer"),  # type: ignore[arg-type]
        (Outer(count=True), r"count is True"),
        (Outer(count=0), r"count is 0"),
        (Outer(maybe=-1), r"maybe is -1: it must be an integer of at least 1 or None"),
        (Outer(flag=1), r"flag is 1: it must be True or False"),  # type: ignore[arg-type]
        (Outer(pair=(0.1,)), r"pair is \(0.1,\): it must be 2 numbers above 0 and of at most 1"),  # type: ignore[arg-type]
        (Outer(pair=(0, 1)), r"pair is \(0, 1\)"),
        (Outer(pair="ab"), r"pair is 'ab'"),  # type: ignore[arg-type]
        (Outer(pair=(float("nan"), 1)), r"pair is \(nan, 1\)"),
        (Outer(many=3), r"many is 3: it must be integers or None"),  # type: ignore[arg-type]
        (Outer(text="5 step\n"), r"text is '5 step\\n': it must be a number of steps"),
        (Outer(path=3), r"path is 3: it must be a path or None"),  # type: ignore[arg-type]
        (Outer(scores={"k": float("inf")}), r"scores is"),
        (Outer(inner=3), r"inner is 3: it must be Inner"),  # type: ignore[arg-type]
        (nested(name="SGD"), r"inner.name is 'SGD': it must be 'adamw' or 'sgd'"),
        (nested(rate=1.5), r"inner.rate is 1.5: it must be a number from 0 to 1"),
        (nested(rate=float("nan")), r"inner.rate is nan"),
        (nested(rate=float("inf")), r"inner.rate is inf"),
        (nested(rate=10**400), r"inner.rate is 1000.*\[...\]|inner.rate is \[...\]"),
        (nested(rate=True), r"inner.rate is True"),
        (nested(rate=None), r"inner.rate is None"),
        (nested(rate=np.array([0.5])), r"inner.rate is array"),
    ],
)
def test_invalid_values_are_named(settings: Outer, words: str) -> None:
    with pytest.raises(UserError, match=words):
        validated(settings)


@pytest.mark.parametrize("content", [[], None, {"rate": "x"}, {"other": 1}, {"name": None}])
def test_an_invalid_file_is_named(content: Any) -> None:
    with pytest.raises(UserError, match=r"state.json is damaged \("):
        parsed(Inner, content, "state.json")
    assert parsed(Inner, {"rate": 1}, "state.json") == Inner(rate=1.0)
