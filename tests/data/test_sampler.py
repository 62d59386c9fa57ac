from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.data.sampler import EpochSampler, spread
from dino.data.views.random_streams import WINDOW, epoch_order
from dino.files import UserError


@settings(deadline=None)
@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 40),
    seed=st.integers(0, 5),
    start=st.integers(0, 30),
    steps=st.integers(0, 30),
)
def test_an_epoch_is_each_image_once_and_a_resume_goes_on(
    length: int, batch: int, seed: int, start: int, steps: int
) -> None:
    if length < batch:
        return
    full = list(EpochSampler(length, batch, seed, stop_step=start + steps))
    assert [len(keys) for keys in full] == [batch] * (start + steps)
    assert list(EpochSampler(length, batch, seed, 0, 1, start, start + steps)) == full[start:]
    steps_per_epoch = length // batch
    for step, keys in enumerate(full):
        assert {epoch for epoch, _ in keys} == {step // steps_per_epoch}
    for epoch in range((start + steps) // steps_per_epoch):
        parts = full[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        visited = [index for keys in parts for _, index in keys]
        assert len(set(visited)) == len(visited) == steps_per_epoch * batch
        assert set(visited) <= set(range(length))


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_share_the_batch_of_one(world: int) -> None:
    full = EpochSampler(20, 6, 0, stop_step=7)
    parts = [EpochSampler(20, 6, 0, rank, world, stop_step=7) for rank in range(world)]
    for batch, *shares in zip(full, *parts, strict=True):
        assert [key for share in shares for key in share] == batch


def test_epochs_differ_and_repeat_with_the_seed() -> None:
    def epochs(seed: int) -> list[tuple[int, ...]]:
        return [tuple(i for _, i in keys) for keys in EpochSampler(30, 30, seed, stop_step=3)]

    assert epochs(0) == epochs(0)
    assert len({*epochs(0), *epochs(1)}) == 6


def test_without_an_end_it_never_ends() -> None:
    assert len(list(islice(EpochSampler(5, 2), 1000))) == 1000


def test_nothing_is_left_when_the_run_has_ended() -> None:
    assert list(EpochSampler(5, 2, start_step=9, stop_step=9)) == []
    assert list(EpochSampler(5, 2, start_step=10, stop_step=9)) == []


def test_too_few_images_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="5 images, fewer than one batch of 8"):
        EpochSampler(5, 8)


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="10 cannot be shared by 4 processes"):
        EpochSampler(50, 10, world=4)
    with pytest.raises(UserError, match="0 cannot be shared"):
        EpochSampler(50, 0)


# ---------------------------------------------------------------------------------- blocks
blocks_of = st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(
    lambda sizes: sum(sizes) > 0
)


@given(blocks_of, st.integers(0, 5), st.integers(0, 9))
def test_the_order_of_blocks_has_each_image_once(sizes: list[int], seed: int, epoch: int) -> None:
    length = sum(sizes)
    order = epoch_order(length, seed, epoch, sizes)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(length))
    assert np.array_equal(order, epoch_order(length, seed, epoch, np.array(sizes)))
    if len(sizes) <= WINDOW:
        assert np.array_equal(order, epoch_order(length, seed, epoch))


@given(blocks_of, st.integers(0, 5))
def test_only_the_blocks_of_a_window_are_read_at_a_time(sizes: list[int], seed: int) -> None:
    block_of = np.repeat(np.arange(len(sizes)), sizes)[epoch_order(sum(sizes), seed, 0, sizes)]
    open_now, opened = set(), []
    for place, block in enumerate(block_of):
        if block not in open_now and not set(block_of[place:]) & open_now:
            open_now = set()  # a new window begins where the last one is done with
        open_now.add(block)
        opened.append(len(open_now))
        assert len(open_now) <= WINDOW


def test_windows_and_what_is_in_them_are_mixed() -> None:
    sizes = [10] * 40  # three windows
    blocks = epoch_order(400, 0, 0, sizes) // 10
    windows = [blocks[:140], blocks[140:270], blocks[270:]]
    assert [len(set(window.tolist())) for window in windows] == [14, 13, 13]
    for window in windows:
        assert np.abs(np.diff(window)).max() > 1  # neighbours in the list are far apart
        assert (window[1:] != window[:-1]).mean() > 0.8
    others = [epoch_order(400, seed, epoch, sizes) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert len({order.tobytes() for order in others}) == 3


@given(
    sizes=blocks_of.filter(lambda sizes: sum(sizes) >= 6),
    start=st.integers(0, 20),
    steps=st.integers(0, 20),
    world=st.sampled_from([1, 2, 3]),
)
def test_blocks_for_ranks_and_after_a_resume(
    sizes: list[int], start: int, steps: int, world: int
) -> None:
    stop = start + steps
    full = list(EpochSampler(sum(sizes), 6, 1, stop_step=stop, blocks=sizes))
    parts = [
        list(EpochSampler(sum(sizes), 6, 1, rank, world, start, stop, sizes))
        for rank in range(world)
    ]
    assert [[key for share in shares for key in share] for shares in zip(*parts, strict=True)] == (
        full[start:]
    )


def test_blocks_that_are_not_the_data_set_are_refused() -> None:
    with pytest.raises(AssertionError, match="blocks of 7 images, not 8"):
        EpochSampler(8, 2, blocks=[3, 4])


def test_spread_is_even() -> None:
    assert spread(10, 5) == [1, 3, 5, 7, 9]
    assert spread(3, 5) == [0, 1, 2]
    assert spread(0, 5) == []
    assert spread(1000, 1) == [500]
