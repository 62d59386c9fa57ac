"""Data sets of the package `datasets`, all of them local."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.packing import CLASSES, pictures, samples

from dino.data.images.decode import as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.sources.open import Source, open_source
from dino.files import UserError

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")
COUNT = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no cache in the home folder, no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def table(root: Path, **columns: object) -> datasets.Dataset:
    items = samples(root)
    names = [of_class for _, _, of_class in items]
    features = {
        "picture": datasets.Image(),
        "label": datasets.ClassLabel(names=list(CLASSES)),
        "id": datasets.Value("int64"),
    }
    rows = {
        "picture": [{"bytes": content, "path": None} for _, content, _ in items],
        "label": [CLASSES.index(name) for name in names],
        "id": list(range(len(items))),
    }
    found = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    for name, values in columns.items():
        found = found.add_column(name, values)
    return found


def saved(root: Path, folder: Path) -> str:
    table(root).save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


def split(root: Path, folder: Path) -> str:
    datasets.DatasetDict({"train": table(root), "test": table(root).select([3])}).save_to_disk(
        folder / "split"
    )
    return f"hf:{folder / 'split'}"


def parquet(root: Path, folder: Path) -> str:
    (folder / "parquet").mkdir()
    table(root).to_parquet(folder / "parquet" / "train.parquet")
    return f"hf:{folder / 'parquet'}"


def folders(root: Path, folder: Path) -> str:
    return f"hf:{root}"


@pytest.mark.parametrize("write", [saved, split, parquet, folders])
def test_images_and_classes(root: Path, tmp_path: Path, write: Callable[[Path, Path], str]) -> None:
    name = write(root, tmp_path)
    source, folder = open_source(name), open_source(root)
    assert isinstance(source, Source)
    assert (len(source), source.labels, source.classes) == (COUNT, folder.labels, list(CLASSES))
    for index in range(COUNT):
        assert torch.equal(as_pixels(source[index]), as_pixels(folder[index]))
    assert source.path(3) == f"row 3 of {name}"
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(as_pixels(copy[3]), as_pixels(folder[3]))


def test_splits(root: Path, tmp_path: Path) -> None:
    name = split(root, tmp_path)
    assert len(open_source(f"{name}?split=test")) == 1
    with pytest.raises(UserError, match=r"it has no split 'val' but train, test; write hf:NAME\?"):
        open_source(f"{name}?split=val")


def stored(found: datasets.Dataset, folder: Path, settings: str = "") -> Source:
    found.save_to_disk(folder / "stored")
    return open_source(f"hf:{folder / 'stored'}{settings}")


def test_columns(root: Path, tmp_path: Path) -> None:
    two = table(root).add_column("target", [f"t{index % 2}" for index in range(COUNT)])
    assert stored(two, tmp_path / "a").classes == list(CLASSES)
    assert stored(two, tmp_path / "b", "?label=target").classes == ["t0", "t1"]
    assert stored(two, tmp_path / "c", "?label=").labels is None
    assert stored(two.remove_columns("label"), tmp_path / "d").labels == [0, 1] * (COUNT // 2)
    with pytest.raises(UserError, match="no column 'kind' of labels: it has picture, label, id, "):
        stored(two, tmp_path / "e", "?label=kind")
    with pytest.raises(UserError, match="has no column 'id' of images: it has picture"):
        stored(two, tmp_path / "f", "?image=id")
    with pytest.raises(UserError, match="no column of the type Image: it has label, id"):
        stored(table(root).remove_columns("picture"), tmp_path / "g")
    fine = table(root).rename_column("label", "fine").add_column("x", [0] * COUNT)
    fine = fine.cast_column("x", datasets.ClassLabel(names=["zero"]))
    with pytest.raises(UserError, match=r"2 columns of labels \(fine, x\): .*label=COLUMN"):
        stored(fine, tmp_path / "h")
    assert stored(fine, tmp_path / "i", "?label=x").classes == ["zero"]


def test_unknown_classes_are_no_labels(root: Path, tmp_path: Path) -> None:
    part = table(root).remove_columns("label").add_column("label", [0] * (COUNT - 1) + [-1])
    part = part.cast_column("label", datasets.ClassLabel(names=["a"]))
    assert stored(part, tmp_path / "a").labels is None
    with pytest.raises(UserError, match=r"some rows of .* have no class in label"):
        stored(part, tmp_path / "b", "?label=label")


def test_rows_that_cannot_be_used_are_named(root: Path, tmp_path: Path) -> None:
    complete = samples(root)[0][1]
    contents = [complete, b"", b"no image", None, complete[: len(complete) // 2]]
    rows = [
        content if content is None else {"bytes": content, "path": None} for content in contents
    ]
    features = datasets.Features({"image": datasets.Image()})
    source = stored(datasets.Dataset.from_dict({"image": rows}, features=features), tmp_path)
    assert source.labels is None
    defects = []
    for index in range(1, 5):
        with pytest.raises(ImageError, match=f"row {index} of hf:") as caught:
            source[index]
        defects.append(caught.value.defect)
    assert defects == ["empty", "not an image", "missing", "damaged"]


def test_objects_of_the_package_are_no_sequences_of_images(root: Path) -> None:
    complete = table(root)
    with pytest.raises(UserError, match=r"a DatasetDict of 'train', 'test': .*data\['train'\]"):
        open_source(datasets.DatasetDict({"train": complete, "test": complete}))
    with pytest.raises(UserError, match=r"'picture', 'label', 'id': .*data\['picture'\]"):
        open_source(complete)
    images = open_source(complete["picture"])
    assert torch.equal(as_pixels(images[3]), as_pixels(open_source(root)[3]))


def test_the_digest_covers_images_and_classes(root: Path, tmp_path: Path) -> None:
    digest = stored(table(root), tmp_path / "a").digest()
    assert stored(table(root), tmp_path / "b").digest() == digest
    assert stored(table(root), tmp_path / "c", "?label=").digest() != digest
    turned = table(root).select(range(COUNT)[::-1])
    assert stored(turned, tmp_path / "d", "?label=").digest() != digest


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hf:nobody/nothing cannot be opened: ") as caught:
        open_source("hf:nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"hf: lacks the name of a data set: write hf:NAME\?"):
        open_source("hf:")
    with pytest.raises(UserError, match="'spilt' is no setting of data sets of the hub"):
        open_source("hf:x?spilt=train")


@pytest.mark.parametrize("form", ["struct", "bytes"])
def test_parquet_without_the_metadata_of_the_hub(root: Path, tmp_path: Path, form: str) -> None:
    """The same rows as a file and as a folder."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    contents = [content for _, content, _ in samples(root)]
    rows = [{"bytes": content, "path": None} for content in contents]
    columns = {"image": rows if form == "struct" else contents, "label": [0, 1] * (COUNT // 2)}
    (tmp_path / "a").mkdir()
    parquet.write_table(arrow.table(columns), tmp_path / "a" / "train.parquet")
    found = [open_source(f"hf:{tmp_path / 'a'}"), open_source(tmp_path / "a" / "train.parquet")]
    for source in found:
        assert (len(source), source.labels) == (COUNT, [0, 1] * (COUNT // 2))
    for index in range(COUNT):
        first, second = (as_pixels(source[index]) for source in found)
        assert torch.equal(first, second)
