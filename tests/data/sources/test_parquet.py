"""Parquet tables that hold the bytes of images."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from helpers.packing import CLASSES, pictures, samples

from dino.data.images.decode import as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.loader import PretrainLoader
from dino.data.sampler import EpochSampler
from dino.data.sources import parquet
from dino.data.sources.lists import FileList
from dino.data.sources.open import Source, open_source
from dino.data.sources.parquet import ParquetImages
from dino.data.views.view_spec import ViewSettings
from dino.files import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
COUNT, GROUP = 8, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT)


def written(file: Path, columns: dict[str, list]) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=GROUP)
    return file


def columns(root: Path, kind: str = "struct") -> dict[str, list]:
    contents = [content for _, content, _ in samples(root)]
    images = {
        "struct": {"image": [{"bytes": content, "path": "x.png"} for content in contents]},
        "bytes": {"path": ["gone.png"] * COUNT, "bytes": contents},
    }
    return {**images[kind], "label": [name for _, _, name in samples(root)]}


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_images_and_classes(root: Path, tmp_path: Path, kind: str) -> None:
    source = open_source(written(tmp_path / "a.parquet", columns(root, kind)))
    folder = open_source(root)
    assert isinstance(source, ParquetImages)
    assert (len(source), source.labels, source.classes) == (COUNT, folder.labels, list(CLASSES))
    assert source.blocks is not None
    assert source.blocks.tolist() == [3, 3, 2]
    for index in (0, 7, 3, 2, -1):
        assert torch.equal(as_pixels(source[index]), as_pixels(folder[index]))
    assert source.path(3) == f"row 3 of {tmp_path / 'a.parquet'}"
    assert open_source(f"{tmp_path}/a.parquet?label=").labels is None


def test_views_do_not_depend_on_workers(root: Path, tmp_path: Path) -> None:
    source = open_source(written(tmp_path / "a.parquet", columns(root)))

    def views(source: Source, workers: int) -> list[torch.Tensor]:
        sampler = EpochSampler(COUNT, 4, 5, stop_step=4, blocks=source.blocks)
        specs = ViewSettings(global_size=12, local_count=1, local_size=8).specs()
        return [b.groups[0].images for b in PretrainLoader(source, specs, sampler, 5, 3, workers)]

    for one, two in zip(views(source, 0), views(open_source(root), 0), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(views(source, 0), views(source, 1), strict=True):
        assert torch.equal(one, two)


def test_few_groups_are_in_memory_and_none_is_sent(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a.parquet", columns(root))
    group = max(open_source(tmp_path / "a.parquet")._sizes)
    monkeypatch.setattr(parquet, "MEMORY", int(2.5 * group))
    source = open_source(tmp_path / "a.parquet")
    for index in range(COUNT):
        _ = source[index]
        assert len(source._groups) <= 2
    copy = pickle.loads(pickle.dumps(source))
    assert copy._groups == {}
    assert torch.equal(as_pixels(copy[5]), as_pixels(source[5]))
    monkeypatch.setattr(parquet, "MEMORY", int(group) - 1)
    with pytest.raises(UserError, match=r"a group of rows of .*a\.parquet has .* row_group_size"):
        open_source(tmp_path / "a.parquet")


def test_rows_that_cannot_be_used_are_named(root: Path, tmp_path: Path) -> None:
    name = samples(root)[0][0]
    rows = [None, {"bytes": None, "path": None}, {"bytes": b"x", "path": None}]
    rows.append({"bytes": None, "path": name})
    source = open_source(f"{written(tmp_path / 'a.parquet', {'image': rows})}?root={root}")
    for index, defect in enumerate(["missing", "missing", "not an image"]):
        with pytest.raises(ImageError, match=rf"row {index} of .*a\.parquet") as caught:
            source[index]
        assert caught.value.defect == defect
    assert torch.equal(as_pixels(source[3]), as_pixels(open_source(root)[0]))
    (tmp_path / "a.parquet").unlink()
    source = pickle.loads(pickle.dumps(source))
    with pytest.raises(ImageError) as caught:
        source[3]
    assert caught.value.defect == "missing"


def test_which_column_holds_the_images(root: Path, tmp_path: Path) -> None:
    contents = [content for _, content, _ in samples(root)]
    file = tmp_path / "a.parquet"
    written(file, {"scan": contents, "thumb": contents})
    with pytest.raises(UserError, match=r"no column of .* is called path: it has scan, thumb"):
        open_source(file)
    assert isinstance(open_source(f"{file}?path=scan"), ParquetImages)
    written(file, {"image": contents, "png": contents})
    with pytest.raises(UserError, match=r"columns of images image, png: name one, as in"):
        open_source(file)
    hashes = [b"%d" % index for index in range(COUNT)]
    written(file, {"path": [str(root / name) for name, _, _ in samples(root)], "hash": hashes})
    assert isinstance(open_source(file), FileList)
    written(file, {"image": []})
    with pytest.raises(UserError, match="is empty"):
        open_source(file)


def test_classes_are_named_as_the_hub_stores_them(root: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])}
    )
    rows = {"image": columns(root)["image"], "label": [0, 1] * (COUNT // 2)}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert (source.classes, source.labels) == (["b", "a"], [0, 1] * (COUNT // 2))
    rows["label"] = [-1] * COUNT
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "b.parquet")
    assert open_source(tmp_path / "b.parquet").labels is None


def test_the_digest_is_that_of_rows_and_sizes(root: Path, tmp_path: Path) -> None:
    table = columns(root)
    one = open_source(written(tmp_path / "a.parquet", table)).digest()
    assert open_source(written(tmp_path / "b.parquet", table)).digest() == one
    table["image"][0] = {"bytes": b"other", "path": None}
    assert open_source(written(tmp_path / "c.parquet", table)).digest() != one
