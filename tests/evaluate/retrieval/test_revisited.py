"""Ground truths: pickle and JSON say the same; hostile and wrong files are refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino.evaluate.retrieval.revisited import GroundTruth, open_benchmark
from dino.files import UserError

IMAGES = ["church_1", "church_2", "tower_1", "tower_2"]
QUERIES = ["church_0", "tower_0"]
CONTENT: dict[str, Any] = {
    "imlist": IMAGES,
    "qimlist": QUERIES,
    "gnd": [
        {"easy": [0], "hard": [1], "junk": [], "bbx": [1.6, 2, 8, 9]},
        {"easy": [2], "hard": [], "junk": [3], "bbx": [0, 0, 4, 5]},
    ],
}


def draw(folder: Path, names: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (10, 12 + number), (number, 0, 0)).save(folder / f"{name}.jpg")


def published(root: Path, content: Any = CONTENT, **how: Any) -> Path:
    """The layout of Revisited Oxford."""
    draw(root / "jpg", [*IMAGES, *QUERIES])
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content, **how))
    return root


def plain(root: Path, content: Any = CONTENT) -> Path:
    draw(root / "database", IMAGES)
    draw(root / "queries", QUERIES)
    (root / "gnd.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("layout", [published, plain])
def test_layouts(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    benchmark = open_benchmark(layout(tmp_path))
    assert benchmark.name == ("roxford5k" if layout is published else tmp_path.name)
    assert [Path(benchmark.database.path(i)).stem for i in range(4)] == IMAGES
    assert [Path(benchmark.queries.path(i)).stem for i in range(2)] == QUERIES
    assert benchmark.truth[0] == GroundTruth([0], [1], [], (1.6, 2.0, 8.0, 9.0))
    assert benchmark.truth[1] == GroundTruth([2], [], [3], (0.0, 0.0, 4.0, 5.0))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_with_arrays_and_numbers_of_numpy(protocol: int, tmp_path: Path) -> None:
    first = {
        "easy": np.array([0], dtype=np.uint16),
        "hard": [np.int64(1)],
        "junk": np.empty(0, dtype=np.float64),
        "bbx": np.array([1.6, 2, 8, 9]),
    }
    content = {**CONTENT, "gnd": [first, CONTENT["gnd"][1]]}
    benchmark = open_benchmark(published(tmp_path, content, protocol=protocol))
    assert benchmark.truth[0] == GroundTruth([0], [1], [], (1.6, 2.0, 8.0, 9.0))


def test_pickles_of_old_numpy_and_python(tmp_path: Path) -> None:
    draw(tmp_path / "jpg", ["a"])
    # Python 2: strings are bytes, numpy's functions lie in numpy.core.
    text = (
        b"(dS'imlist'\n(lS'a'\nasS'qimlist'\n(lS'a'\nasS'gnd'\n(l(dS'easy'\n"
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I1\ntcnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        b"I00\nS'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\ntbsS'hard'\n(lsS'junk'\n(lsas."
    )
    (tmp_path / "gnd_rparis6k.pkl").write_bytes(text)
    assert open_benchmark(tmp_path).truth == [GroundTruth([0], [], [])]


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("inside", [True, False])
def test_a_hostile_pickle_is_refused_and_not_run(inside: bool, tmp_path: Path) -> None:
    mark = tmp_path / "was run"
    content = {**CONTENT, "imlist": Hostile(mark)} if inside else Hostile(mark)
    root = published(tmp_path, content)
    with pytest.raises(UserError, match=r"gnd_roxford5k.pkl is refused: it would run or build"):
        open_benchmark(root)
    assert not mark.exists()
    pickle.loads((root / "gnd_roxford5k.pkl").read_bytes())
    assert mark.exists()  # so the pickle was hostile


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c_codecs\nencode\n(Vx\nVzip\ntR.",
        b"not a pickle",
        b"",
    ],
)
def test_other_pickles_are_refused(code: bytes, tmp_path: Path) -> None:
    draw(tmp_path / "jpg", IMAGES)
    (tmp_path / "gnd_x.pkl").write_bytes(code)
    with pytest.raises(UserError, match=r"gnd_x\.pkl is (no pickle of plain|refused)"):
        open_benchmark(tmp_path)


@pytest.mark.timeout(20)  # the hash of the key alone takes 2 ** 60 operations
def test_a_key_of_nested_tuples_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "jpg", IMAGES)
    nested: tuple[Any, ...] = ()
    for _ in range(60):
        nested = (nested, nested)
    code = b"}" + pickle.dumps(nested, 2)[2:-1] + b"Ns."  # {nested: None}
    (tmp_path / "gnd_x.pkl").write_bytes(code)
    with pytest.raises(UserError, match=r"gnd_x\.pkl is refused: a key in it is too deep"):
        open_benchmark(tmp_path)


def changed(**changes: Any) -> dict[str, Any]:
    return {**CONTENT, **changes}


def first(**changes: Any) -> dict[str, Any]:
    return changed(gnd=[{**CONTENT["gnd"][0], **changes}, CONTENT["gnd"][1]])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "no list 'imlist'"),
        ({k: v for k, v in CONTENT.items() if k != "qimlist"}, "no list 'qimlist'"),
        (changed(gnd=[]), "'gnd' .* is empty"),
        (changed(gnd=CONTENT["gnd"][:1]), "1 queries in gnd but 2 in qimlist"),
        (changed(gnd=[1, 2]), "query 0 .* no dict"),
        (
            changed(gnd=[{"ok": [0], "junk": []}] * 2),
            "no dict of easy, hard and junk: is it the revis",
        ),
        (first(hard=[4]), "image 4 of 4: is it the ground truth of other images"),
        (first(hard=[-1]), "image -1 of 4"),
        (first(hard=["x"]), "'hard' of query 0 .* no list of indices"),
        (first(bbx=[1, 2]), "bbx of query 0 .* not four numbers"),
        (first(bbx=[5, 5, 5, 9]), "bbx of query 0 .* is empty"),
        (changed(imlist=[*IMAGES[:3], "bridge"]), "bridge, which .*database lacks"),
        (changed(qimlist=["church_0", "bridge"]), "bridge, which .*queries lacks"),
    ],
)
def test_ground_truths_that_do_not_fit_are_refused(
    content: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        open_benchmark(plain(tmp_path, content))
    assert "gnd.json" in str(refusal.value)


def test_wrong_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is no folder"):
        open_benchmark(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no ground truth"):
        open_benchmark(tmp_path)
    (tmp_path / "inner").mkdir()
    inner = plain(tmp_path / "inner")
    with pytest.raises(UserError, match=r"no ground truth: give --benchmark .*inner"):
        open_benchmark(tmp_path)
    (inner / "gnd_x.pkl").touch()
    with pytest.raises(UserError, match=r"several ground truths \(gnd.json, gnd_x.pkl\)"):
        open_benchmark(inner)
    (inner / "gnd_x.pkl").unlink()
    for path in (inner / "queries").iterdir():
        path.unlink()
    (inner / "queries").rmdir()
    with pytest.raises(UserError, match="lacks the folder queries/"):
        open_benchmark(inner)


def test_queries_are_cut_to_their_boxes(tmp_path: Path) -> None:
    benchmark = open_benchmark(plain(tmp_path))
    boxed = open_benchmark(tmp_path, boxed=True).queries
    assert [boxed[i].size for i in range(2)] == [(6, 7), (4, 5)]  # type: ignore[union-attr]
    assert [benchmark.queries[i].size for i in range(2)] == [(10, 12), (10, 13)]  # type: ignore[union-attr]
    assert boxed.path(0) == benchmark.queries.path(0)


def test_boxes_must_be_known(tmp_path: Path) -> None:
    root = plain(tmp_path, first(bbx=None))
    assert open_benchmark(root).truth[0].box is None
    with pytest.raises(UserError, match=r"gnd\.json has no bbx"):
        open_benchmark(root, boxed=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["gnd.json", "gnd_x.pkl"])
def test_a_pipe_is_no_ground_truth(name: str, tmp_path: Path) -> None:
    draw(tmp_path / "jpg", IMAGES)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="holds no ground truth"):
        open_benchmark(tmp_path)
