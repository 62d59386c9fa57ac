"""The layout of COCO: run lengths against a slow decoder, and what a file says of an image."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from oracle.discovery import decoded

from dino.evaluate.segmentation.coco import annotation, dataset, run_lengths


@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
)
def test_run_lengths_give_the_mask_back(seed: int, height: int, width: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    found = run_lengths(mask)
    assert np.array_equal(decoded(found), mask)
    assert all(count > 0 for count in found["counts"][1:])


def test_run_lengths_by_hand() -> None:
    mask = np.array([[0, 1, 1], [0, 1, 0]], dtype=bool)
    assert run_lengths(mask) == {"size": [2, 3], "counts": [2, 3, 1]}
    assert run_lengths(~mask) == {"size": [2, 3], "counts": [0, 2, 3, 1]}


def test_a_file_names_images_and_their_objects() -> None:
    mask = np.array([[0, 1], [0, 1], [0, 0]], dtype=bool)
    one = annotation(mask, (1, 0, 1, 2), 0.25)
    content = dataset(
        [("photos/a/x.jpg", (3, 2), one), ("/far/y.jpg", (3, 2), one)], "photos", {"by": "us"}
    )
    assert content["info"] == {"by": "us"}
    assert content["images"] == [
        {"id": 1, "file_name": "a/x.jpg", "width": 2, "height": 3},
        {"id": 2, "file_name": "/far/y.jpg", "width": 2, "height": 3},
    ]
    assert [category["id"] for category in content["categories"]] == [1]
    first, second = content["annotations"]
    assert first == {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [1, 0, 1, 2],
        "area": 2,
        "segmentation": {"size": [3, 2], "counts": [3, 2, 1]},
        "iscrowd": 0,
        "score": 0.25,
    }
    assert (second["id"], second["image_id"]) == (2, 2)
