"""Label propagation against its oracle, and what must hold for every video."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import propagation as oracle
from torch import Tensor

from dino.evaluate.video import propagation
from dino.evaluate.video.propagation import Neighbourhood, Propagator, directions
from dino.evaluate.video.tracking import Tracking
from dino.files import UserError


def video(seed: int, frames: int, size: tuple[int, int], width: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(frames, width, *size, generator=generator, dtype=torch.float64))


def soft(seed: int, channels: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(*shape[:-2], channels, *shape[-2:], generator=generator)
    return labels.double()


def propagate(target: Tensor, context: Tensor, labels: Tensor, how: Neighbourhood) -> Tensor:
    """Labels [C, h, w] of one frame from features [D, h, w] and [n, D, h, w] and labels."""
    frames = (directions(target), directions(context), labels.permute(0, 2, 3, 1))
    return propagation.propagate(*frames, how).permute(2, 0, 1)


@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    frames=st.integers(1, 3),
    radius=st.sampled_from([None, 0, 1, 2, 9]),
    neighbours=st.integers(1, 7),
    tile=st.integers(1, 7),
)
def test_windows_and_tiles_equal_the_oracle(
    seed: int, size: Any, frames: int, radius: int | None, neighbours: int, tile: int
) -> None:
    target, *context = video(seed, frames + 1, size)
    labels = soft(seed, 2, frames, *size)
    how = Neighbourhood(radius=radius, neighbours=neighbours, temperature=0.3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(propagation, "TILE", tile)
        found = propagate(target, torch.stack(context), labels, how)
    expected = oracle.propagate(target, torch.stack(context), labels, radius, neighbours, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_sources_equal_to_the_last_neighbour_count() -> None:
    target = torch.tensor([1.0, 0, 0], dtype=torch.float64)[:, None, None]
    context = torch.tensor([[0, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    labels = torch.tensor([8.0, 1, 2, 6], dtype=torch.float64)[:, None, None, None]
    how = Neighbourhood(neighbours=2)
    assert propagate(target, context[..., None, None], labels, how).item() == pytest.approx(3)


def test_a_video_equals_the_oracle_and_forgets_old_frames() -> None:
    frames = video(3, 7, (4, 5))
    first = soft(3, 2, 4, 5)
    for last in (0, 2, 9):
        how = Neighbourhood(radius=1, neighbours=3, temperature=0.2, last_frames=last)
        propagator = Propagator(frames[0], first, how)
        found = [first, *(propagator.step(frame) for frame in frames[1:])]
        expected = oracle.video(frames, first, last, 1, 3, 0.2)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_moving_object_is_tracked_within_the_window() -> None:
    generator = torch.Generator().manual_seed(0)
    background = torch.randn(8, 6, 12, generator=generator)
    thing = 5 * torch.eye(8)[0]
    labels = torch.zeros(2, 6, 12)
    labels[0] = 1
    frames = []
    for time in range(4):
        frame = background.clone()
        frame[:, 2:4, 2 * time : 2 * time + 2] = thing[:, None, None]
        frames.append(frame)
    labels[:, 2:4, 0:2] = torch.tensor([0.0, 1.0])[:, None, None]
    propagator = Propagator(frames[0], labels, Neighbourhood(radius=2))
    for time in range(1, 4):
        found = propagator.step(frames[time])[1] > 0.5
        expected = torch.zeros(6, 12, dtype=torch.bool)
        expected[2:4, 2 * time : 2 * time + 2] = True
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"radius": -1}, "radius"),
        ({"neighbours": 0}, "neighbours"),
        ({"temperature": 0.0}, "temperature"),
        ({"last_frames": -1}, "last_frames"),
        ({"size": 0}, "size"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Tracking(**settings)
