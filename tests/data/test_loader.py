from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dino.data.images.decode import crop_resize, to_pil, to_tensor
from dino.data.images.preprocessing import Preprocessing
from dino.data.loader import Batch, EvaluationBatch, PretrainLoader, ViewDataset, evaluation_loader
from dino.data.sampler import EpochSampler
from dino.data.sources.open import Folder, open_source
from dino.data.views.random_streams import draw_views, generator
from dino.data.views.view_spec import ViewSettings, expand
from dino.files import UserError

SPECS = ViewSettings(global_size=24, local_count=3, local_size=16).specs()
LENGTH, BATCH, STEPS = 14, 4, 8  # 3 steps an epoch


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Images of various sizes."""
    source = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, 20 + index, 30 - index), dtype=torch.uint8, generator=source)
        for index in range(LENGTH)
    ]


def batches(
    data: object, workers: int = 0, rank: int = 0, world: int = 1, start: int = 0
) -> list[Batch]:
    source = open_source(data)
    sampler = EpochSampler(len(source), BATCH, 5, rank, world, start, STEPS)
    return list(PretrainLoader(source, SPECS, sampler, seed=5, workers=workers))


def assert_equal(one: Batch, two: Batch) -> None:
    assert (one.epoch, one.step) == (two.epoch, two.step)
    assert torch.equal(one.index, two.index)
    for group, other in zip(one.groups, two.groups, strict=True):
        assert torch.equal(group.images, other.images)
        assert torch.equal(group.params, other.params)


def test_a_batch_holds_the_views_that_were_drawn(images: list[Tensor]) -> None:
    for step, batch in enumerate(batches(images)):
        assert (batch.step, batch.epoch) == (step, step // 3)
        assert batch.index.dtype == torch.int64
        globals_, locals_ = batch.groups
        assert globals_.images.shape == (2, BATCH, 3, 24, 24)
        assert locals_.images.shape == (3, BATCH, 3, 16, 16)
        assert globals_.images.dtype == torch.uint8
        assert locals_.params.dtype == torch.float32
        crops = [*globals_.images, *locals_.images]
        params = [*globals_.params, *locals_.params]
        for place, index in enumerate(batch.index.tolist()):
            image = images[index]
            views = draw_views(SPECS, *image.shape[1:], generator(5, batch.epoch, index))
            for view, spec, crop, row in zip(views, expand(SPECS), crops, params, strict=True):
                expected = crop_resize(image, view.box, spec.size, view.flip)
                assert torch.equal(crop[place], expected)
                assert torch.equal(row[place], torch.tensor(view.row()))


@pytest.mark.parametrize("workers", [1, 4])
def test_views_do_not_depend_on_workers(images: list[Tensor], workers: int) -> None:
    for one, two in zip(batches(images), batches(images, workers), strict=True):
        assert_equal(one, two)


def test_views_do_not_depend_on_ranks(images: list[Tensor]) -> None:
    halves = [batches(images, rank=rank, world=2) for rank in range(2)]
    for full, *shares_of_ranks in zip(batches(images), *halves, strict=True):
        assert torch.equal(full.index, torch.cat([share.index for share in shares_of_ranks]))
        for position, group in enumerate(full.groups):
            shares = [share.groups[position] for share in shares_of_ranks]
            assert torch.equal(group.images, torch.cat([g.images for g in shares], dim=1))
            assert torch.equal(group.params, torch.cat([g.params for g in shares], dim=1))


@pytest.mark.parametrize("start", [1, 3, 7, STEPS])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_sees_the_very_next_batches(
    images: list[Tensor], start: int, workers: int
) -> None:
    rest = batches(images, workers, start=start)
    assert len(rest) == STEPS - start
    for one, two in zip(batches(images)[start:], rest, strict=True):
        assert_equal(one, two)


def test_an_image_has_new_views_in_each_epoch(images: list[Tensor]) -> None:
    rows = {}
    for batch in batches(images):
        for place, index in enumerate(batch.index.tolist()):
            rows.setdefault(index, set()).add(tuple(batch.groups[0].params[0, place].tolist()))
    assert max(len(views) for views in rows.values()) == 3
    assert sum(len(views) for views in rows.values()) == STEPS * BATCH


def test_globals_are_a_group_of_their_own_also_where_sizes_are_equal(
    images: list[Tensor],
) -> None:
    source = open_source(images)
    specs = ViewSettings(global_size=16, local_count=3, local_size=16).specs()
    [batch] = PretrainLoader(source, specs, EpochSampler(LENGTH, 2, stop_step=1), seed=0)
    assert [len(group.images) for group in batch.groups] == [2, 3]


def test_folders_give_what_their_images_give(images: list[Tensor], tmp_path: Path) -> None:
    for index, image in enumerate(images):
        to_pil(image).save(tmp_path / f"{index:02}.png")
    for one, two in zip(batches(images), batches(tmp_path), strict=True):
        assert_equal(one, two)


def test_the_models_random_numbers_stay_untouched(images: list[Tensor]) -> None:
    before = torch.random.get_rng_state()
    batches(images)
    batches(images, workers=1)
    assert torch.equal(torch.random.get_rng_state(), before)


class Stubborn:
    """A data set with one item that cannot be read."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Tensor:
        if index == 9:
            raise KeyError("no such patient")
        return torch.full((3, 20, 20), torch.get_num_threads(), dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_used_is_replaced(
    images: list[Tensor], tmp_path: Path, workers: int
) -> None:
    for index, image in enumerate(images):
        to_pil(image).save(tmp_path / f"{index:02}.png")
    good = batches(tmp_path)
    bad = {3, 8, 9}
    for index in bad:
        (tmp_path / f"{index:02}.png").write_bytes(b"no image")
    found, reported = batches(tmp_path, workers), {}
    halves = [batches(tmp_path, rank=rank, world=2) for rank in range(2)]
    for one, two, *shares_of_ranks in zip(found, good, *halves, strict=True):
        usable = [place for place, index in enumerate(two.index.tolist()) if index not in bad]
        assert torch.equal(one.index[usable], two.index[usable])
        assert not bad & set(one.index.tolist())
        for group, other in zip(one.groups, two.groups, strict=True):
            assert torch.equal(group.images[:, usable], other.images[:, usable])
            assert torch.equal(group.params[:, usable], other.params[:, usable])
        assert torch.equal(one.index, torch.cat([share.index for share in shares_of_ranks]))
        reported |= {error.path: error.defect for error in one.skipped}
    assert reported == {str(tmp_path / f"{index:02}.png"): "not an image" for index in bad}


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_images_ends_in_a_sentence(tmp_path: Path, workers: int) -> None:
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"32 images.*\d\.png cannot be read") as caught:
        batches(tmp_path, workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_users_data_set_names_the_item(workers: int) -> None:
    with pytest.raises(RuntimeError, match=r"reading item 9 of the Stubborn failed: KeyError"):
        batches(Stubborn(), workers)


def test_workers_run_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sampler = EpochSampler(8, 8, stop_step=1)  # its items are those before the stubborn one
        loader = PretrainLoader(open_source(Eight()), SPECS, sampler, seed=0, workers=1)
        [batch] = loader
    finally:
        torch.set_num_threads(threads)
    assert batch.groups[0].images.unique().tolist() == [1]


class Eight(Stubborn):
    """Only the items that can be read."""

    def __len__(self) -> int:
        return 8


def test_what_a_worker_gets_can_be_sent_to_a_new_process(tmp_path: Path) -> None:
    """Where processes are spawned, not forked."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    views = pickle.loads(pickle.dumps(ViewDataset(Folder(tmp_path), SPECS, seed=0)))
    assert views.__getitems__([(0, 0)]).groups[0].images.shape == (2, 1, 3, 24, 24)


def test_specs_without_two_globals_are_refused(images: list[Tensor]) -> None:
    with pytest.raises(UserError, match="2 global views"):
        PretrainLoader(open_source(images), SPECS[:1], EpochSampler(LENGTH, 2), seed=0)


def test_a_group_goes_to_a_device(images: list[Tensor]) -> None:
    group = batches(images)[0].groups[0].to(torch.device("meta"))
    assert (group.images.device.type, group.params.device.type) == ("meta", "meta")


# ---------------------------------------------------------------------------------- evaluation
def evaluated(data: object, workers: int | None = 0) -> Iterator[EvaluationBatch]:
    preprocess = Preprocessing(resize=20, crop=16)
    return evaluation_loader(open_source(data), preprocess, batch=4, workers=workers)


def test_evaluation_has_as_many_workers_as_cores_allow(
    images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def counted(dataset: object, workers: int, **options: object) -> None:
        started.append(workers)

    monkeypatch.setattr("dino.data.loader._data_loader", counted)
    monkeypatch.setattr("dino.data.loader.default_workers", lambda: 7)
    evaluated(images, workers=None), evaluated(images, workers=3)
    assert started == [7, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once_in_order(images: list[Tensor], workers: int) -> None:
    found = list(evaluated(images, workers))
    assert torch.cat([batch.index for batch in found]).tolist() == list(range(LENGTH))
    preprocess = Preprocessing(resize=20, crop=16)
    expected = torch.stack([preprocess(to_pil(image)) for image in images])
    assert torch.equal(torch.cat([batch.images for batch in found]), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_tells_what_it_cannot_use(
    images: list[Tensor], tmp_path: Path, workers: int
) -> None:
    for index, image in enumerate(images[:9]):
        to_pil(image).save(tmp_path / f"{index}.png")
    for index in (1, 4, 5, 6, 7):  # all of the second batch
        (tmp_path / f"{index}.png").write_bytes(b"")
    found = list(evaluated(tmp_path, workers))
    assert [batch.index.tolist() for batch in found] == [[0, 2, 3], [], [8]]
    assert [len(batch.images) for batch in found] == [3, 0, 1]
    reported = [error.path for batch in found for error in batch.skipped]
    assert reported == [str(tmp_path / f"{index}.png") for index in (1, 4, 5, 6, 7)]


def test_pictures_and_their_tensors_give_the_same_views(images: list[Tensor]) -> None:
    pictures = [to_pil(image) for image in images]
    assert torch.equal(to_tensor(pictures[0]), images[0])
    for one, two in zip(batches(images), batches(pictures), strict=True):
        assert_equal(one, two)
