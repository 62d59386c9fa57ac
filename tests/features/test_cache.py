"""Features on disk: found again, gone on with after a kill, and never taken for others."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.fakes import COLORS, MeanColor
from PIL import Image
from torch import Tensor

from dino import files
from dino.data.images.preprocessing import Preprocessing
from dino.data.sources.open import Source, open_source
from dino.features import cache as stores
from dino.features.extractor import Descriptor, extract
from dino.features.table import FeatureTable
from dino.files import UserError, read_json, replacing
from dino.models.backbone import Backbone
from dino.runtime import Ranks

SMALL = Preprocessing(resize=8, crop=8)


@dataclass
class Counted:
    """A descriptor that counts the images that it computed."""

    stop_at: int | None = None
    images: int = 0

    def __call__(self, backbone: Backbone, images: Tensor) -> Tensor:
        self.images += len(images)
        if self.stop_at is not None and self.images > self.stop_at:
            raise KeyboardInterrupt
        return torch.cat([backbone(images), images.amax(dim=(1, 2, 3))[:, None]], dim=1)


def measured(
    source: Source, store: Path | None, count: Counted | None = None, **how: Any
) -> FeatureTable:
    descriptor = Descriptor("color", SMALL, count or Counted(), {"power": 1})
    return extract(MeanColor(), source, descriptor, store=store, **{"batch": 2, **how})


def assert_equal(ours: FeatureTable, theirs: FeatureTable) -> None:
    assert torch.equal(ours.features, theirs.features)
    assert ours.paths == theirs.paths
    assert ours.classes == theirs.classes
    assert ours.labels is not None
    assert theirs.labels is not None
    assert torch.equal(ours.labels, theirs.labels)
    assert [str(error) for error in ours.skipped] == [str(error) for error in theirs.skipped]


@pytest.fixture
def source(color_folder: Callable[..., Path]) -> Source:
    return open_source(color_folder("photos", 3))


def test_a_table_is_computed_once(source: Source, tmp_path: Path) -> None:
    first, second = Counted(), Counted()
    plain = measured(source, None)
    assert_equal(measured(source, tmp_path / "store", first), plain)
    assert_equal(measured(source, tmp_path / "store", second, batch=5), plain)
    assert (first.images, second.images) == (9, 0)
    (folder,) = (tmp_path / "store").iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["about.json", "done.json", "features.npy"]
    assert read_json(folder / "about.json")["settings"] == {"power": 1}


def test_a_large_table_is_mapped(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "MAPPED", 0)
    opened: list[Any] = []
    load = stores.np.load
    monkeypatch.setattr(
        stores.np, "load", lambda *a, **k: opened.append(load(*a, **k)) or opened[-1]
    )
    assert_equal(measured(source, tmp_path / "store"), measured(source, None))
    assert isinstance(opened[0], stores.np.memmap)


def test_an_interruption_keeps_all_computed_rows(source: Source, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(source, tmp_path / "store", Counted(stop_at=5))
    rest = Counted()
    assert_equal(measured(source, tmp_path / "store", rest), measured(source, None))
    assert rest.images == 9 - 4


def compute_slowly(folder: Path, store: Path) -> None:
    """In a separate process, to be killed: every batch is written at once and printed."""
    stores.FLUSH_SECONDS = 0.0

    def compute(backbone: Backbone, images: Tensor) -> Tensor:
        print("batch", flush=True)
        time.sleep(0.1)
        return Counted()(backbone, images)

    descriptor = Descriptor("color", SMALL, compute, {"power": 1})
    extract(MeanColor(), open_source(folder), descriptor, store=store, batch=2)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_extraction_continues(color_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, store = color_folder("photos", 3), tmp_path / "store"
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(store)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    try:
        for _ in range(3):  # the third batch has begun, so the first two are written
            assert process.stdout.readline() == "batch\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        process.stdout.close()
    assert not list(store.glob("*/done.json"))
    rest = Counted()
    assert_equal(measured(open_source(folder), store, rest), measured(open_source(folder), None))
    assert 9 - 6 <= rest.images <= 9 - 4


def test_all_parts_but_no_table(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, parts: Any, skipped: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stores._CachedTable, "_merge_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measured(source, tmp_path / "store")
    rest = Counted()
    assert_equal(measured(source, tmp_path / "store", rest), measured(source, None))
    assert rest.images == 0


class Lost(Exception):
    """The group is gone with one of its ranks."""


def on_a_rank(here: Ranks, folder: Path, stores_at: Path) -> list[tuple[FeatureTable, int]]:
    def lost() -> None:
        raise Lost

    source, results = open_source(folder), []
    os.chdir(stores_at / f"disk{here.rank}")
    for store in (stores_at / "fresh", stores_at / "begun", Path("private")):
        count = Counted()
        results.append((measured(source, store, count, batch=1), count.images))
    count = Counted(stop_at=3 if here.rank == 0 else None)
    stores.barrier = lost  # type: ignore[assignment]
    with pytest.raises((Lost, KeyboardInterrupt)):
        measured(source, stores_at / "lost", count, batch=1)
    return results


def test_ranks_share_the_work_whoever_began_it(
    color_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = color_folder("photos", 4)
    folder.joinpath("red", "0.png").unlink()  # eleven images: unequal shares
    source = open_source(folder)
    alone = measured(source, None, batch=1)
    for rank in range(2):
        (tmp_path / f"disk{rank}").mkdir()
    with pytest.raises(KeyboardInterrupt):
        measured(source, tmp_path / "begun", Counted(stop_at=4), batch=1)
    found = ranks.run(on_a_rank, 2, folder, tmp_path)
    shares = [[count for _, count in results] for results in found]
    assert shares == [[5, 3, 5], [6, 4, 6]]  # of 11; of the other 7; of 11 without a common disk
    for results in found:
        for table, _ in results:
            assert_equal(table, alone)
    rest = Counted()
    assert_equal(measured(source, tmp_path / "lost", rest, batch=1), alone)
    assert rest.images == 11 - 3 - 6


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_whatever_changes_the_numbers_makes_another_table(
    color_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, store = color_folder("photos", 2), tmp_path / "store"
    descriptor = Descriptor("color", SMALL, Counted(), {"power": 1})

    def computed(**how: Any) -> int:
        count = Counted()
        arguments = {"descriptor": descriptor, "backbone": MeanColor(), **how}
        arguments["descriptor"] = replace(arguments["descriptor"], compute=count)
        extract(source=open_source(folder), store=store, **arguments)
        return count.images

    assert computed() == 6
    assert computed() == 0
    assert computed(descriptor=replace(descriptor, settings={"power": 2})) == 6
    assert computed(descriptor=replace(descriptor, name="colour")) == 6
    assert computed(descriptor=replace(descriptor, transform=Preprocessing(9, 8))) == 6
    assert computed(precision="bf16") == 6
    other = MeanColor()
    torch.nn.init.constant_(other.scale, 2.0)
    assert computed(backbone=other) == 6
    touched(folder / "red" / "1.png")
    assert computed() == 6
    Image.new("RGB", (9, 9)).save(folder / "red" / "2.png")
    assert computed() == 7
    assert computed() == 0
    shutil.rmtree(store)
    assert computed() == 7


def test_labels_are_no_part_of_a_table(color_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, listing, rest = color_folder("photos", 1), tmp_path / "list.csv", Counted()
    for names in ("123", "222"):
        lines = [f"photos/{c}/0.png,{n}" for c, n in zip(COLORS, names, strict=True)]
        listing.write_text("\n".join(["path,label", *lines]))
        table = measured(open_source(listing), tmp_path / "store", rest)
        assert table.labels is not None
        assert len(set(table.labels.tolist())) == len(set(names))
    assert rest.images == len(list(folder.rglob("*.png")))


def test_images_that_are_no_files_are_not_cached(tmp_path: Path) -> None:
    for shade in (10, 200):
        images = open_source([(Image.new("RGB", (8, 8), (shade, 0, 0)), 0)])
        assert_equal(measured(images, tmp_path / "store"), measured(images, None))
    assert not (tmp_path / "store").exists()


def test_images_that_cannot_be_used_are_remembered(
    color_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, store = color_folder("photos", 2), tmp_path / "store"
    (folder / "green" / "0.png").write_bytes(b"no picture")
    source, again = open_source(folder), Counted()
    for count in (Counted(), again):
        table = measured(source, store, count)
        assert_equal(table, measured(source, None))
        assert len(table) == 5
        assert [error.defect for error in table.skipped] == ["not an image"]
    assert again.images == 0


class Flaky:
    """A folder of which some files cannot be read for the moment."""

    def __init__(self, folder: Path, refused: set[int]) -> None:
        self.folder, self.refused = open_source(folder), refused
        self.labels, self.classes = self.folder.labels, self.folder.classes

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Any:
        if index in self.refused:
            raise stores.ImageError(self.path(index), "the server sleeps", "unreadable")
        return self.folder[index]

    def path(self, index: int) -> str:
        return self.folder.path(index)


def test_a_defect_of_the_moment_is_tried_again(
    color_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, store = color_folder("photos", 2), tmp_path / "store"
    for refused, computed in [({1, 4}, 4), ({1}, 1), ({1}, 0), (set(), 1), (set(), 0)]:
        count = Counted()
        source = Flaky(folder, refused)
        assert_equal(measured(source, store, count), measured(source, None))
        assert count.images == computed


def test_images_that_failed_before_an_interruption_are_tried_again(
    color_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, store = color_folder("photos", 2), tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        measured(Flaky(folder, {1}), store, Counted(stop_at=3))
    rest = Counted()
    assert_equal(measured(open_source(folder), store, rest), measured(open_source(folder), None))
    assert rest.images == 6 - 3


def test_no_usable_image_is_an_error_each_time(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.png").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 1 images.*bad\.png"):
            measured(open_source(tmp_path / "data"), tmp_path / "store")


def test_two_processes_at_one_table_do_not_disturb_each_other(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overtaken(Counted):
        def __call__(self, backbone: Backbone, images: Tensor) -> Tensor:
            if self.images == 4:  # meanwhile another process does it all, and removes the parts
                measured(source, tmp_path / "store")
            return super().__call__(backbone, images)

    monkeypatch.setattr(stores, "FLUSH_SECONDS", 0.0)
    assert_equal(measured(source, tmp_path / "store", Overtaken()), measured(source, None))
    (folder,) = (tmp_path / "store").iterdir()
    assert not list(folder.glob("part-*"))


@pytest.mark.parametrize("moment", ["read", "rows"])
def test_another_process_may_join_the_parts_first(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    method, again = stores._Part.__dict__[moment], Counted()
    call = method.__func__ if moment == "read" else method

    def overtaken(self: Any, *arguments: Any) -> Any:
        monkeypatch.setattr(stores._Part, moment, method)
        measured(source, tmp_path / "store", again)  # joins all parts and removes them
        return call(self, *arguments)

    monkeypatch.setattr(
        stores._Part, moment, classmethod(overtaken) if moment == "read" else overtaken
    )
    assert_equal(measured(source, tmp_path / "store"), measured(source, None))
    assert again.images == 0


def test_missing_parts_are_an_error_and_not_zeros(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "FLUSH_SECONDS", 0.0)

    def robbed() -> None:
        next(tmp_path.glob("store/*/part-*")).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(stores, "barrier", robbed)
        with pytest.raises(FileNotFoundError, match="run the command again"):
            measured(source, tmp_path / "store")
    assert_equal(measured(source, tmp_path / "store"), measured(source, None))


def test_a_transform_that_hides_its_parameters_is_refused(source: Source, tmp_path: Path) -> None:
    descriptor = Descriptor("color", lambda image: SMALL(image), Counted(), {})
    with pytest.raises(ValueError, match="hides its parameters"):
        extract(MeanColor(), source, descriptor, store=tmp_path)


def test_a_store_that_cannot_be_written_is_done_without(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    table = measured(source, tmp_path / "file" / "store")
    assert_equal(table, measured(source, None))
    assert "--store" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["part-", "features.npy", "done.json"])
def test_a_full_disk_costs_the_cached_table_only(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(path: Path) -> Any:
        if Path(path).name.startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return replacing(path)

    monkeypatch.setattr(files, "replacing", full)
    monkeypatch.setattr(stores, "replacing", full)
    assert_equal(measured(source, tmp_path / "store"), measured(source, None))
    monkeypatch.undo()
    assert_equal(measured(source, tmp_path / "store"), measured(source, None))


if __name__ == "__main__":
    compute_slowly(Path(sys.argv[1]), Path(sys.argv[2]))
