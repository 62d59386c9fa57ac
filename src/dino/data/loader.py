"""Batches of views for pretraining, batches of preprocessed images for evaluation.

Workers decode each image once and cut every crop from it, in uint8. The batch also holds the
photometric parameters, which `dino.data.views.photometric.augment` applies on the device.

Shapes: V views, B images (this rank's share of a batch), C channels, S side, P parameters.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, Num, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from dino.data.images.decode import OpenedImage, as_picture, as_pixels, crop_resize
from dino.data.images.image_errors import ImageError
from dino.data.images.jpeg_scale import reduced_box, reduction
from dino.data.sampler import EpochSampler
from dino.data.sources.open import Source
from dino.data.views.random_streams import draw_views, generator, substitutes
from dino.data.views.view_spec import PHOTOMETRIC, ViewSpec, expand, view_groups
from dino.data.workers import TOO_MANY, batches_of
from dino.files import UserError
from dino.runtime import default_workers

# Linux forks: data sets from notebooks and scripts need neither pickling nor a main guard, workers
# start in milliseconds, and the list of files stays shared memory (`PackedStrings`). Workers touch
# no accelerator and run one thread, so what fork does not copy is not missed. Elsewhere system
# libraries do not survive a fork.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"

TRIES = 32
"""An image and its substitutes that are tried, in all."""


class ViewGroup(NamedTuple):
    """Views of one size, not yet altered in colour.

    Attributes:
        images: the crops.
        params: one row of `dino.data.views.view_spec.PHOTOMETRIC` for each crop.
    """

    images: UInt8[Tensor, "V B C S S"]
    params: Float32[Tensor, "V B P"]

    def to(self, device: torch.device) -> ViewGroup:
        """Copy to a device; the host does not wait where the memory is pinned."""
        return ViewGroup(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass
class Batch:
    """This rank's images of one training step.

    Attributes:
        groups: the two global views first, then each run of local views of one size.
        index: of each image in the source.
        epoch: counted from 0.
        skipped: errors of the images that were replaced by others.
        step: counted from 0 at the start of training.
    """

    groups: list[ViewGroup]
    index: Int64[Tensor, " B"]
    epoch: int
    skipped: list[ImageError] = field(default_factory=list)
    step: int = 0

    def pin_memory(self) -> Batch:
        """Move into pinned memory (called by the `DataLoader`)."""
        pinned = [ViewGroup(*map(Tensor.pin_memory, group)) for group in self.groups]
        return replace(self, groups=pinned)


@dataclass
class EvaluationBatch:
    """Some images of an evaluation.

    Attributes:
        images: preprocessed; normalised, or still pixels.
        index: of each in the source.
        skipped: those that cannot be used.
    """

    images: Num[Tensor, "B C H W"]
    index: Int64[Tensor, " B"]
    skipped: list[ImageError]


class PretrainLoader:
    """All batches of a run, from one `DataLoader` that lives as long as the run.

    The views of an image depend on (seed, epoch, index) alone: not on `workers`, ranks, the batch
    size, or where the run was resumed.

    Args:
        source: the images.
        specs: the views of each; the first two views are the global ones.
        sampler: which images at which step, for this rank.
        seed: of the views.
        channels: of the images; see `ViewSpec.for_channels`.
        workers: processes that decode and crop; 0 does it between the steps.
        pin: put the batches into pinned memory (for CUDA).

    Raises:
        UserError: if the specs do not start with two global views of one size; while iterating, if
            no image can be used (naming the last), or if a worker dies. Single images are
            replaced, see `Batch.skipped`.
        RuntimeError: while iterating, if a user's data set fails (naming the item).
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        sampler: EpochSampler,
        seed: int,
        channels: int = 3,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.sampler = sampler
        self._views = ViewDataset(source, specs, seed, channels)
        self._loader = _data_loader(self._views, workers, batch_sampler=sampler, pin_memory=pin)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the sampler's steps."""
        for step, batch in enumerate(batches_of(self._loader), self.sampler.start_step):
            if isinstance(batch, UserError):
                raise batch
            batch.step = step
            yield batch

    def sample(self, images: int, seconds: float) -> tuple[Batch, float]:
        """Views of the first images of the next step, made by this process; seconds for each.

        Args:
            images: at most as many; at least one is made.
            seconds: no further one is begun after this time.

        Raises:
            UserError: as while iterating.
        """
        keys = next(iter(self.sampler))[:images]
        batches: list[Batch] = []
        started = time.perf_counter()
        for key in keys:
            batches.append(self._views.batch([key]))
            if time.perf_counter() - started > seconds:
                break
        took = (time.perf_counter() - started) / len(batches)
        groups = [
            ViewGroup(
                torch.cat([group.images for group in parts], dim=1),
                torch.cat([group.params for group in parts], dim=1),
            )
            for parts in zip(*(batch.groups for batch in batches), strict=True)
        ]
        return Batch(groups, torch.cat([b.index for b in batches]), batches[0].epoch), took


def evaluation_loader(
    source: Source,
    preprocess: Callable[[Any], Num[Tensor, "C H W"]],
    batch: int = 64,
    workers: int | None = 0,
) -> Iterator[EvaluationBatch]:
    """Every image of a source once, in order, preprocessed; see `image_batches`.

    `preprocess` makes an input from a PIL picture, or from a uint8 tensor [C, H, W] where images
    have other channels than RGB.
    """
    return image_batches(source, partial(_preprocessed, preprocess=preprocess), batch, workers)


def image_batches(
    source: Source,
    read: Callable[[Source, int], Num[Tensor, "C H W"]],
    batch: int = 16,
    workers: int | None = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[EvaluationBatch]:
    """The images of a source at `indices` (None for all), in order, as `read(source, index)`.

    `workers` processes read them, `batch` at a time; None are `default_workers()`.

    Raises:
        RuntimeError: if a user's data set fails (naming the item).
    """
    workers = default_workers() if workers is None else workers
    sampler = range(len(source)) if indices is None else indices
    dataset = _ImageDataset(source, read)
    return batches_of(_data_loader(dataset, workers, batch_size=batch, sampler=sampler))


# ---------------------------------------------------------------------------------- in workers
class ViewDataset(Dataset[Any]):
    """Makes the views of an entire batch from a list of (epoch, index); see `PretrainLoader`."""

    def __init__(
        self, source: Source, specs: Sequence[ViewSpec], seed: int, channels: int = 3
    ) -> None:
        self.source, self.seed, self.channels = source, seed, channels
        self.specs = tuple(spec.for_channels(channels) for spec in specs)
        self.sizes = [spec.size for spec in expand(specs)]
        self.groups = view_groups(specs)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch | UserError:
        try:
            return self.batch(keys)
        except UserError as error:  # returned, since a DataLoader would wrap it in a traceback
            return error

    def batch(self, keys: Sequence[tuple[int, int]]) -> Batch:
        """The views of each image, or of the first of its substitutes that can be used.

        The draws are those for (seed, epoch, index) in both cases.

        Raises:
            UserError: if neither an image nor `TRIES` - 1 substitutes can be used.
        """
        groups = []
        for members in self.groups:
            shape, side = (len(members), len(keys)), self.sizes[members[0]]
            images = torch.empty((*shape, self.channels, side, side), dtype=torch.uint8)
            groups.append(ViewGroup(images, torch.empty((*shape, len(PHOTOMETRIC)))))
        indices, skipped = [], []
        for position, (epoch, index) in enumerate(keys):
            others = substitutes(len(self.source), self.seed, epoch, index)
            for candidate in chain([index], islice(others, TRIES - 1)):
                try:
                    with _errors_named(self.source, candidate):
                        crops, rows = self._views(candidate, generator(self.seed, epoch, index))
                    break
                except ImageError as error:
                    skipped.append(error)
            else:
                misfit = skipped[-1].defect == "misfit"  # its reason says what to do
                raise UserError(
                    f"{TRIES} images, one after the other, could not be used, the last because "
                    f"{skipped[-1]}{'' if misfit else ': check the images with dino data check'}"
                )
            indices.append(candidate)
            for members, group in zip(self.groups, groups, strict=True):
                for place, view in enumerate(members):
                    group.images[place, position] = crops[view]
                group.params[:, position] = rows[members.start : members.stop]
        return Batch(groups, torch.tensor(indices), keys[0][0], skipped)

    def _views(self, index: int, rng: np.random.Generator) -> tuple[list[Tensor], Tensor]:
        """Crops of image `index`, decoded at the scale that they allow, and `PHOTOMETRIC` rows."""
        with self.source.open(index) as image:
            height, width = image.size
            views = draw_views(self.specs, height, width, rng)
            boxes = [view.box for view in views]
            factor = reduction(boxes, self.sizes)
            pixels = decoded(image, self.source.path(index), self.channels, factor)
        if pixels.shape[1:] != (height, width):
            boxes = [reduced_box(box, factor, *pixels.shape[1:]) for box in boxes]
        crops = [
            crop_resize(pixels, box, size, view.flip)
            for box, size, view in zip(boxes, self.sizes, views, strict=True)
        ]
        return crops, torch.tensor([view.row() for view in views])


class _ImageDataset(Dataset[Any]):
    """Makes a batch of images from a list of indices."""

    def __init__(self, source: Source, read: Callable[[Source, int], Tensor]) -> None:
        self.source, self.read = source, read

    def __getitems__(self, indices: list[int]) -> EvaluationBatch:
        images: dict[int, Tensor] = {}
        skipped = []
        for index in indices:
            try:
                with _errors_named(self.source, index):
                    images[index] = self.read(self.source, index)
            except ImageError as error:
                skipped.append(error)
        stacked = torch.stack(list(images.values())) if images else torch.empty(0, 0, 0, 0)
        return EvaluationBatch(stacked, torch.tensor(list(images), dtype=torch.int64), skipped)


def _preprocessed(source: Source, index: int, preprocess: Callable[[Any], Tensor]) -> Tensor:
    sample = source[index]
    # Transforms of evaluations know pictures; only other channels come as tensors.
    rgb = not isinstance(sample, Tensor) or len(sample) == 3
    return preprocess(as_picture(sample) if rgb else sample)


def decoded(
    image: OpenedImage, name: str, channels: int, factor: int = 1
) -> UInt8[Tensor, "C H W"]:
    """The pixels of an opened image; an `ImageError` for another number of channels."""
    pixels = as_pixels(image.decode(factor))
    if len(pixels) != channels:
        raise ImageError(name, f"it has {len(pixels)} channels, not {channels}", "misfit")
    return pixels


@contextmanager
def _errors_named(source: Source, index: int) -> Iterator[None]:
    """Errors that name the image: a user's data set may raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        name = type(error).__name__
        raise RuntimeError(f"reading {source.path(index)} failed: {name}: {error}") from error


# ---------------------------------------------------------------------------------- processes
def _data_loader(dataset: Dataset[Any], workers: int, **options: Any) -> DataLoader[Any]:
    """A `DataLoader` over a data set that makes entire batches (`__getitems__`)."""
    if workers > 0:  # PyTorch itself limits each worker to one thread
        options |= {"persistent_workers": True, "multiprocessing_context": _START_METHOD}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TOO_MANY, UserWarning)
        return DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=default_convert,
            # A separate generator, so that opening a loader takes no number from the model's.
            generator=torch.Generator(),
            **options,
        )
