"""Images that occur more than once among files, found by their bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from dino.data.equal_files import Group, equal_files
from dino.data.sources.open import Source

EXAMPLES = 10
"""Most shared images that a result names."""


@dataclass(frozen=True)
class SharedImages:
    """Test images that also serve as training images, or as the bank of k-NN.

    Attributes:
        count: how many of the test images.
        images: how many there are.
        examples: up to ten, each with its equal.
        leave_one_out: whether the test images are the bank itself, so that equals are others in it.
    """

    count: int
    images: int
    examples: list[tuple[str, str]]
    leave_one_out: bool

    def sentence(self) -> str:
        """What a table says of them; "" if there are none."""
        if not self.count:
            return ""
        where = "have a copy in the bank" if self.leave_one_out else "are also training images"
        first, equal = self.examples[0]
        return (
            f"{self.count:,} of {self.images:,} test images {where} (files with equal bytes), "
            f"such as {first} and {equal}: they are counted, but test nothing"
        )


def paths_of(*sources: Source) -> list[str]:
    """The names of all images of some sources; those of files are their paths."""
    return [source.path(index) for source in sources for index in range(len(source))]


def shared_images(training: Sequence[str], test: Sequence[str] | None) -> SharedImages | None:
    """Compare test images with training images, or the images of a bank with each other.

    Args:
        training: the paths of the training images, or of the bank.
        test: those of the test images; None where each image of the bank is one.

    Returns:
        None where the images of a side are no files, which are not compared.
    """
    sides = [training] if test is None else [training, test]
    if not all(any(map(os.path.isfile, paths)) for paths in sides):
        return None
    start = 0 if test is None else len(training)  # of the test images among all paths
    paths = [*training, *(test or ())]

    def wanted(group: Group) -> bool:
        return len(group) > 1 and (test is None or group[0] < start <= group[-1])

    pairs = [
        (paths[image], paths[group[0] if image != group[0] else group[1]])
        for group in equal_files(paths, wanted)
        for image in group
        if image >= start
    ]
    return SharedImages(len(pairs), len(paths) - start, pairs[:EXAMPLES], test is None)
