"""Tar shards: contents as in webdataset, views as from folders."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ranks as processes
from helpers.dicoms import dicom
from helpers.packing import CLASSES, members, pictures, samples, shards, tar
from torch import Tensor

from dino.data.images.decode import as_pixels
from dino.data.images.image_errors import ImageError
from dino.data.loader import Batch, PretrainLoader, ViewDataset
from dino.data.sampler import EpochSampler
from dino.data.sources import byte_ranges as blobs
from dino.data.sources import shard_index
from dino.data.sources.open import Source, open_source
from dino.data.sources.shards import Shards, expand, shard_settings
from dino.data.views.random_streams import WINDOW, epoch_order
from dino.data.views.view_spec import ViewSettings
from dino.files import UserError
from dino.runtime import Ranks

fsspec = pytest.importorskip("fsspec")
webdataset = pytest.importorskip("webdataset")

SPECS = ViewSettings(global_size=12, local_count=1, local_size=8).specs()
COUNT, BATCH, STEPS = 20, 4, 12  # five steps an epoch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT)


def same(one: Source, two: Source) -> bool:
    return len(one) == len(two) and all(
        torch.equal(as_pixels(one[index]), as_pixels(two[index])) for index in range(len(one))
    )


# ---------------------------------------------------------------------------------- contents
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_holds_what_its_folder_holds(root: Path, tmp_path: Path, kind: int) -> None:
    deep = "d" * 60 + "/" + "e" * 60 + "/"
    files = [(f"{deep}{name}", content) for name, content, _ in samples(root)]
    tar(tmp_path / "a.tar", files, kind)
    source = open_source(tmp_path / "a.tar")
    assert isinstance(source, Source)
    assert same(source, open_source(root))
    assert source.path(3) == f"{tmp_path}/a.tar/{files[3][0]}"
    assert (source.labels, source.classes, source.blocks.tolist()) == (None, None, [COUNT])


@pytest.mark.parametrize("writer", ["shard", "tar"])
def test_what_webdataset_writes(root: Path, tmp_path: Path, writer: str) -> None:
    items = samples(root)
    if writer == "shard":
        opened = webdataset.ShardWriter(f"{tmp_path}/a-%02d.tar", maxcount=7, verbose=0)
        name = f"{tmp_path}/a-{{00..02}}.tar"
    else:
        name = f"{tmp_path}/a.tar"
        opened = webdataset.TarWriter(name)
    with opened as sink:
        for key, content, of_class in items:
            number = CLASSES.index(of_class)
            sink.write({"__key__": key[:-4], "png": content, "cls": number, "json": {"a": 1}})
    source = open_source(name)
    assert same(source, open_source(root))
    assert source.blocks.tolist() == ([7, 7, 6] if writer == "shard" else [COUNT])
    assert source.labels == [CLASSES.index(of_class) for _, _, of_class in items]
    assert source.classes == ["0", "1", "2"]


def test_samples_are_those_of_webdataset(root: Path, tmp_path: Path) -> None:
    """Odd names: keys with dots in folders, capitals, members without an extension, meta files."""
    (_, one, _), (_, two, _), (_, three, _), *_ = samples(root)
    files = [
        ("__meta__", b"no"),
        ("__index__/0.png", b"no"),
        ("v1.2/a.PNG", one),
        ("v1.2/a.json", b"{}"),
        ("README", b"no"),
        (".hidden.png", b"no"),
        ("b.txt", b"alone"),
        ("c.left.png", two),
        ("c.cls", b"1"),
        ("v1.2/a.png", three),
    ]
    tar(tmp_path / "a.tar", files)
    with (tmp_path / "a.tar").open("rb") as file:
        parts = (
            {**part, "__url__": ""} for part in webdataset.tariterators.tar_file_iterator(file)
        )
        theirs = list(webdataset.tariterators.group_by_keys(parts))
    found = [
        (item["__key__"], value) for item in theirs for key, value in item.items() if "png" in key
    ]
    source = open_source(f"{tmp_path}/a.tar?label=")
    names = ["v1.2/a.PNG", "c.left.png", "v1.2/a.png"]
    assert [source.path(i) for i in range(len(source))] == [f"{tmp_path}/a.tar/{n}" for n in names]
    assert found == [("v1.2/a", one), ("c", two), ("v1.2/a", three)]


@pytest.mark.parametrize("label", ["cls", "txt", "json"])
def test_labels(root: Path, tmp_path: Path, label: str) -> None:
    name = shards(tmp_path, root, 3, label)
    source = open_source(name)
    assert source.labels == open_source(root).labels
    assert source.classes == (["0", "1", "2"] if label == "cls" else list(CLASSES))
    assert open_source(f"{name}?label=").labels is None
    other = "txt" if label == "cls" else "cls"
    with pytest.raises(UserError, match=rf"part-000\.tar/cat/000\.png has no label in \.{other}: "):
        open_source(f"{name}?label={other}")
    with pytest.raises(UserError, match="labels of shards are in cls, txt, json, not in 'class'"):
        open_source(f"{name}?label=class")


def test_captions_are_no_labels_and_a_missing_label_is_named(root: Path, tmp_path: Path) -> None:
    items = samples(root)
    texts = [(f"{name[:-4]}.txt", f"picture {name}".encode()) for name, _, _ in items]
    images = [(name, content) for name, content, _ in items]
    tar(tmp_path / "a.tar", [file for pair in zip(images, texts, strict=True) for file in pair])
    assert open_source(tmp_path / "a.tar").labels is None
    tar(tmp_path / "b.tar", members(items[:5], "cls") + images[5:])
    with pytest.raises(UserError, match=r"005\.png has no label in \.cls, but others have"):
        open_source(tmp_path / "b.tar")
    long = [("a.png", images[0][1]), ("a.txt", b"x" * 90), ("b.png", images[1][1])]
    tar(tmp_path / "c.tar", [*long, ("b.txt", b"x" * 90)])
    assert open_source(tmp_path / "c.tar").labels is None
    with pytest.raises(UserError, match=r"a\.png has a text that is no class name in \.txt: leave"):
        open_source(f"{tmp_path}/c.tar?label=txt")


def test_which_member_is_the_image(root: Path, tmp_path: Path) -> None:
    contents = [content for _, content, _ in samples(root)]
    one = [("a.png", contents[0]), ("a.mask.png", contents[1]), ("a.cls", b"4")]
    two = [("b.mask.png", contents[2]), ("b.png", contents[3]), ("b.cls", b"2")]
    tar(tmp_path / "a.tar", one + two)
    plain, masks = open_source(tmp_path / "a.tar"), open_source(f"{tmp_path}/a.tar?image=mask.png")
    assert [plain.path(i)[-len("b.png") :] for i in range(2)] == ["a.png", "b.png"]
    assert [masks.path(i).rpartition("/")[2] for i in range(2)] == ["a.mask.png", "b.mask.png"]
    assert (plain.labels, masks.labels) == ([1, 0], [1, 0])
    tar(tmp_path / "c.tar", [("a.npy", b"1"), ("a.png", contents[0]), ("a.jpg.npy", b"2")])
    assert open_source(tmp_path / "c.tar").path(0).endswith("a.png")
    tar(tmp_path / "b.tar", [("a.jpg", b"1"), ("a.png", b"2")])
    with pytest.raises(UserError, match=r"several images \(a\.jpg and \.png\): .*\?image=jpg'"):
        open_source(tmp_path / "b.tar")
    assert open_source(f"{tmp_path}/b.tar?image=png").path(0).endswith("a.png")
    with pytest.raises(UserError, match=r"holds an image in \.gif: found 1 \.jpg, 1 \.png"):
        open_source(f"{tmp_path}/b.tar?image=gif")


def test_the_digest_is_that_of_members(root: Path, tmp_path: Path) -> None:
    items = samples(root)
    digests = []
    for number, files in enumerate((members(items, "cls"), members(items, ""), members(items[1:]))):
        tar(tmp_path / f"{number}.tar", files)
        digests.append(open_source(tmp_path / f"{number}.tar").digest())
    assert len(set(digests)) == 3
    tar(tmp_path / "copy.tar", members(items, "cls"))
    os.utime(tmp_path / "copy.tar", (1, 1))
    assert open_source(tmp_path / "copy.tar").digest() == digests[0]


def test_other_members_are_counted(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [("a.png", samples(root)[0][1]), ("a.cls", b"1"), ("a.xcf", b""), ("a.[b].xcf", b"")]
    tar(tmp_path / "a.tar", files)
    assert open_source(tmp_path / "a.tar").left_out == {".xcf": 1, ".[b].xcf": 1}
    assert "a.tar: 2 files are left out, being no images: 1 .[b].xcf, 1 .xcf\n" in (
        capsys.readouterr().err
    )


def test_a_deeply_nested_json_is_no_label(root: Path, tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [("a.png", samples(root)[0][1]), ("a.json", b"[" * 200_000)])
    assert open_source(tmp_path / "a.tar").labels is None


# ---------------------------------------------------------------------------------- names
def test_names_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_WHERE", "/data")
    for name, expected in {
        "a-{08..10}.tar": ["a-08.tar", "a-09.tar", "a-10.tar"],
        "{a,b}/{0..1}.tar": ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"],
        "a.tar::b-{0..1}.tar": ["a.tar", "b-0.tar", "b-1.tar"],
        "${WHERE}/a.tar": ["/data/a.tar"],
    }.items():
        assert expand(name) == webdataset.shardlists.expand_urls(name) == expected
    cached = "simplecache::s3://b/{0..1}.tar::c.tar"
    assert expand(cached) == ["simplecache::s3://b/0.tar", "simplecache::s3://b/1.tar", "c.tar"]
    literal = tmp_path / "{0..1}.tar"
    literal.touch()
    assert expand(str(literal)) == [str(literal)]
    for wrong in ("a-{0..1.tar", "${NOWHERE}.tar"):
        with pytest.raises(UserError, match="does not name shards"):
            expand(wrong)


def test_what_is_called_like_shards() -> None:
    assert shard_settings("a.tar") == ("a.tar", {})
    assert shard_settings("a.TAR?image=png&label=") == ("a.TAR", {"image": "png", "label": ""})
    signed = "https://host/a.tar?X-Signature=3"
    assert shard_settings(signed) == (signed, {})
    assert shard_settings("https://host/a.tar?label=cls") == (
        "https://host/a.tar",
        {"label": "cls"},
    )
    assert shard_settings("tar") is None
    with pytest.raises(UserError, match="'imgae' is no setting of shards: write SHARDS"):
        shard_settings("a.tar?imgae=png")
    for name in ("a.tar.gz", "a-{0..9}.tgz", "https://host/a.tar.zst?x=1"):
        assert shard_settings(name) == (name, {})


# ---------------------------------------------------------------------------------- URLs
@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_shards_by_url(root: Path, tmp_path: Path, memory: Any) -> None:
    local = shards(tmp_path, root, 3, "cls")
    for path in sorted(tmp_path.glob("*.tar")):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    for name in (
        "memory://bucket/part-{000..002}.tar",
        f"file://{tmp_path}/part-{{000..002}}.tar",
        f"simplecache::file://{tmp_path}/part-{{000..002}}.tar",
    ):
        source = open_source(name)
        assert same(source, open_source(local))
        assert source.labels == open_source(root).labels
        for one, two in zip(batches(source, workers=1), batches(open_source(local)), strict=True):
            assert_equal(one, two)
    with pytest.raises(UserError, match=r"memory://bucket/part-003\.tar does not exist"):
        open_source("memory://bucket/part-{000..003}.tar")
    with pytest.raises(UserError, match=r"nosuch://a/b\.tar cannot be read: .*nosuch"):
        open_source("nosuch://a/b.tar")


def test_requests_to_a_server_are_repeated(
    root: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/a.tar", tar("", members(samples(root))))
    source = open_source("memory://a.tar")
    cat, failures = type(memory).cat_file, [OSError("reset"), ValueError("busy")]

    def flaky(self: object, *arguments: object, **options: object) -> bytes:
        if failures:
            raise failures.pop()
        return cat(self, *arguments, **options)

    monkeypatch.setattr(blobs, "PAUSE", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "cat_file", flaky)
        assert torch.equal(as_pixels(source[2]), as_pixels(open_source(root)[2]))
        failures += [ValueError("gone")] * 3
        with pytest.raises(ImageError, match=r"a\.tar/cat/002\.png cannot .*: gone") as caught:
            source[2]
        assert caught.value.defect == "unreadable"
        patched.setattr(type(memory), "cat_file", lambda self, path, **_: cat(self, path))
        with pytest.raises(UserError, match=r"sends entire files .* simplecache::memory://a\.tar"):
            source[2]
    memory.rm("/a.tar")
    with pytest.raises(ImageError) as caught:
        source[2]
    assert caught.value.defect == "missing"


# ---------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("label", ["", "cls"])
def test_samples_before_a_cut_are_used_with_a_warning(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], label: str
) -> None:
    path, items = tmp_path / "a.tar", samples(root)
    complete = tar(path, members(items, label))
    third = complete.index(items[2][1])
    for end, used, reason in [
        (third + 10, 2, "it ends inside cat/002.png, at byte"),
        (third - 10, 2, "it ends without an end mark, at byte"),
        (third - 512, 2, "it ends without an end mark, at byte"),
        # The third image is complete, and so is its sample where there are no labels.
        (third + len(items[2][1]), 2 if label else 3, "it ends without an end mark, at byte"),
    ]:
        path.write_bytes(complete[:end])
        for _ in range(2):  # from the headers, then from the cache
            source = open_source(path)
            assert [as_pixels(source[i]).shape for i in range(len(source))] == [
                as_pixels(open_source(root)[i]).shape for i in range(used)
            ]
            assert source.labels == ([0] * used if label else None)
            printed = capsys.readouterr().err
            assert f"a.tar is damaged: {reason}" in printed
            assert f"the {used} images before are used, the rest is lost" in printed
    path.write_bytes(complete)
    assert len(open_source(path)) == COUNT
    assert capsys.readouterr().err == ""


def test_a_shard_that_is_cut_under_a_run(root: Path, tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", members(samples(root)))
    source = open_source(tmp_path / "a.tar")
    assert as_pixels(source[0]).shape[0] == 3
    os.truncate(tmp_path / "a.tar", 2000)
    with pytest.raises(ImageError, match=r"005\.png.* the shard ends after 0 of its") as caught:
        source[5]
    assert caught.value.defect == "damaged"


def test_a_shard_that_cannot_be_read_to_its_end(
    root: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "PAUSE", 0.0)
    complete = tar("", members(samples(root)))
    memory.pipe("/a.tar", complete)
    info = type(memory).info

    def larger(self: object, path: str) -> dict[str, object]:
        return {**info(self, path), "size": len(complete) + 512}

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "info", larger)
        with pytest.raises(UserError, match=r"memory://a\.tar gave \d+ bytes of \d+ at \d+: start"):
            open_source("memory://a.tar")

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no\nroute")

    monkeypatch.setattr(type(memory), "cat_file", failing)
    with pytest.raises(UserError, match=r"memory://a\.tar cannot be read: no route"):
        open_source("memory://a.tar")
    with pytest.raises(UserError, match="does not exist"):
        open_source("::".join(f"/nowhere/{number:03}.tar" for number in range(500)))


def test_many_damaged_shards_are_one_sentence(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = shards(tmp_path, root, 3)
    for number in (1, 2):
        path = tmp_path / f"part-{number:03}.tar"
        path.write_bytes(path.read_bytes()[:4000])
    open_source(name)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "part-001.tar is damaged" in printed
    assert "(and 1 more shards are damaged)" in printed


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(expected: str, content: bytes | None = None, name: str = "a.tar") -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=expected) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)

    refused(r"a\.tar does not exist")
    refused(r"no sample of .*a\.tar holds an image: found nothing", b"")
    refused(r"no sample of .*a\.tar holds an image: found 2 \.pth, 1 \.cls",
            tar("", [("a.pth", b""), ("b.pth", b""), ("b.cls", b"")]))  # fmt: skip
    for name in ("a.tar", "a.tar.gz", "a.tbz", "a.tar.xz"):
        for content in (gzip.compress(b"1"), bz2.compress(b"1"), lzma.compress(b"1")):
            refused("is compressed, so that no single image", content, name)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        about = tarfile.TarInfo("a.png")
        about.type, about.linkname = tarfile.LNKTYPE, "b.png"
        archive.addfile(about)
    refused(r"a\.png in .*a\.tar is a link and no regular file: pack it again")


# ---------------------------------------------------------------------------------- the index
def test_a_second_start_reads_no_header(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = shards(tmp_path, root, 3, "txt")
    first = open_source(name)

    def unwanted(*_: object) -> None:
        raise AssertionError("the shard is read again")

    with monkeypatch.context() as patched:
        patched.setattr(shard_index, "members", unwanted)
        second = open_source(name)
        assert same(first, second)
        assert (second.labels, second.classes) == (first.labels, first.classes)
        assert [second.path(i) for i in range(COUNT)] == [first.path(i) for i in range(COUNT)]
        changed = tmp_path / "part-001.tar"
        os.utime(changed, (time.time(), time.time() - 5))
        with pytest.raises(AssertionError, match="read again"):
            open_source(name)
    tar(changed, [("new.png", samples(root)[0][1]), ("new.txt", b"gnu")])
    third = open_source(name)
    assert third.blocks.tolist() == [7, 1, 6]
    assert third.classes == ["cat", "emu", "gnu"]


@pytest.mark.parametrize("damage", [b"", b"no", None])
def test_a_damaged_cache_is_made_anew(
    root: Path, tmp_path: Path, cache: Path, damage: bytes | None
) -> None:
    name = shards(tmp_path, root, 2)
    open_source(name)
    used = sorted((cache / "shards").iterdir())
    assert len(used) == 2
    for file in used:
        file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    assert same(open_source(name), open_source(root))


def test_without_a_cache_folder_it_works_too(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "file" / "below"))
    assert same(open_source(shards(tmp_path, root, 2)), open_source(root))


def test_a_shard_that_changes_under_a_run_is_not_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(shards(tmp_path, root, 2))
    source = pickle.loads(pickle.dumps(source))
    blobs._local_file.cache_clear()
    tar(tmp_path / "part-001.tar", [("a.png", b"other")])
    assert as_pixels(source[0]).shape[0] == 3
    with pytest.raises(UserError, match=r"part-001\.tar has changed since the start"):
        source[COUNT - 1]


def test_open_files_are_few(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = shards(tmp_path, root, COUNT)
    source = open_source(name)
    blobs._local_file.cache_clear()
    monkeypatch.setattr(blobs, "_local_file", blobs.lru_cache(maxsize=3)(blobs._LocalFile))
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("this system does not list open files")
    before = len(list(folder.iterdir()))
    assert same(source, open_source(root))
    assert len(list(folder.iterdir())) <= before + 3


# ---------------------------------------------------------------------------------- views
def batches(
    source: Source, workers: int = 0, rank: int = 0, world: int = 1, start: int = 0
) -> list[Batch]:
    blocks = source.blocks
    sampler = EpochSampler(len(source), BATCH, 5, rank, world, start, STEPS, blocks)
    return list(PretrainLoader(source, SPECS, sampler, seed=5, workers=workers))


def assert_equal(one: Batch, two: Batch) -> None:
    assert (one.epoch, one.step) == (two.epoch, two.step)
    assert torch.equal(one.index, two.index)
    for group, other in zip(one.groups, two.groups, strict=True):
        assert torch.equal(group.images, other.images)
        assert torch.equal(group.params, other.params)


def by_image(parts: list[Batch]) -> dict[tuple[int, int], list[Tensor]]:
    """The views of each image of each epoch."""
    return {
        (batch.epoch, index): [
            tensor[:, place] for group in batch.groups for tensor in (group.images, group.params)
        ]
        for batch in parts
        for place, index in enumerate(batch.index.tolist())
    }


def assert_same_views(one: list[Batch], two: list[Batch]) -> None:
    ours, theirs = by_image(one), by_image(two)
    shared = ours.keys() & theirs.keys()
    assert len(shared) > COUNT
    for key in shared:
        for tensor, other in zip(ours[key], theirs[key], strict=True):
            assert torch.equal(tensor, other)


@pytest.fixture(scope="module")
def many(root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As many shards as there are images: more than a window has."""
    return shards(tmp_path_factory.mktemp("many"), root, COUNT)


def test_views_do_not_depend_on_the_kind_of_source(root: Path, tmp_path: Path, many: str) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(str(root / name) for name, _, _ in samples(root)))
    folder = batches(open_source(root))
    few = batches(open_source(shards(tmp_path / "few", root, 3)))
    for one, two, three in zip(folder, few, batches(open_source(listing)), strict=True):
        assert_equal(one, two)  # up to a window of shards the order is that of a folder
        assert_equal(one, three)
    assert_same_views(batches(open_source(many)), folder)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on two cores
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("start", [0, 7])
def test_shards_for_workers_and_after_a_resume(many: str, workers: int, start: int) -> None:
    rest = batches(open_source(many), workers, start=start)
    for one, two in zip(batches(open_source(many))[start:], rest, strict=True):
        assert_equal(one, two)


def _of_rank(here: Ranks, name: str, start: int) -> list[Batch]:
    return batches(open_source(name), rank=here.rank, world=here.world, start=start)


def test_shards_for_ranks(many: str) -> None:
    complete = batches(open_source(many))
    for start in (0, 7):
        halves = [_of_rank(Ranks(rank, 2, rank), many, start) for rank in range(2)]
        for one, *parts in zip(complete[start:], *halves, strict=True):
            assert torch.equal(one.index, torch.cat([part.index for part in parts]))
            for position, group in enumerate(one.groups):
                shares = [part.groups[position].images for part in parts]
                assert torch.equal(group.images, torch.cat(shares, dim=1))


def test_ranks_that_start_at_once_agree(root: Path, many: str, cache: Path) -> None:
    """Real processes, an empty cache: nobody reads what another has half written."""
    halves = processes.run(_of_rank, 2, many, 0)
    for one, *parts in zip(batches(open_source(many)), *halves, strict=True):
        assert torch.equal(one.index, torch.cat([part.index for part in parts]))
        shares = [part.groups[0].images for part in parts]
        assert torch.equal(one.groups[0].images, torch.cat(shares, dim=1))
    assert len(list((cache / "shards").iterdir())) == COUNT


def test_the_order_of_shards_is_that_of_their_blocks(many: str) -> None:
    source = open_source(many)
    assert len(source.blocks) > WINDOW
    visited = [index for batch in batches(source) for index in batch.index.tolist()]
    order = [i for epoch in range(3) for i in epoch_order(COUNT, 5, epoch, source.blocks)]
    assert visited == order[: len(visited)]


def test_what_a_worker_gets_can_be_sent_to_a_new_process(many: str) -> None:
    views = pickle.dumps(ViewDataset(open_source(many), SPECS, seed=0))
    blobs._local_file.cache_clear()
    assert pickle.loads(views).__getitems__([(0, 3)]).groups[0].images.shape == (2, 1, 3, 12, 12)


def test_a_shards_index_is_small(many: str) -> None:
    """In memory and when it is sent: arrays, no objects for each image."""
    source = open_source(many)
    assert isinstance(source, Shards)
    assert {type(value).__name__ for value in vars(source).values()} <= {
        *("PackedStrings", "ndarray", "list", "NoneType", "dict")
    }
    assert not any(isinstance(value, list) for value in vars(source).values())
    assert json.dumps(source.blocks.tolist()) == json.dumps([1] * COUNT)


def test_dicom_members_need_no_ending(tmp_path: Path) -> None:
    dicom(stream := io.BytesIO(), np.full((4, 5), 7, np.uint16))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("case/IM0001", "case/1.2.840.17", "case/README", "case/a.dcm"):
            content = b"no image" if name.endswith("README") else stream.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    source = open_source(tmp_path / "a.tar")
    names = [Path(source.path(index)).name for index in range(len(source))]
    assert names == ["IM0001", "1.2.840.17", "a.dcm"]
    assert source.left_out == {"": 1}
    assert np.asarray(source[0]).shape == (3, 4, 5)
