"""Tar shards as webdataset writes them, each image by its index.

A shard is an uncompressed tar. Consecutive members whose names agree up to the first dot of the
base name are one sample: `dog/0017.jpg`, `dog/0017.cls`. With the places of all images
(`dino.data.sources.shard_index`) an image is one read of its bytes, in any order, so that views,
resuming, ranks and workers are those of folders.

    --data "shards/train-{000..127}.tar"
    --data "s3://bucket/train-{000..127}.tar?label=json"
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from dino.data.images.image_errors import ImageError
from dino.data.images.pixel_format import EXTENSIONS
from dino.data.sources.base import (
    Source,
    image_errors,
    needs_extra,
    number_classes,
    split_settings,
    warn,
)
from dino.data.sources.byte_ranges import is_remote, read_range
from dino.data.sources.folder import count_kinds
from dino.data.sources.packed_strings import PackedStrings
from dino.data.sources.shard_index import CAPTION, LABELS, Index, index_shards
from dino.files import UserError

FORM = "SHARDS.tar?image=EXTENSION&label=EXTENSION"

_SHARD = re.compile(r"\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_CACHE = re.compile("(simplecache|filecache|blockcache)::")  # of fsspec, before another protocol


class Shards(Source):
    """The images of tar shards, shard by shard in the order of their members.

    Args:
        urls: the shards; see `expand`.
        image: extension of the images, such as "png" or "left.jpg"; by default the only one of a
            sample (of several, the only one without another dot; never a .npy beside a picture).
        label: "cls", "txt" or "json"; by default the first of them that samples have, where texts
            count only if they are short and repeat like names do; "" for none.

    Raises:
        UserError: if a shard is missing or compressed, holds links or sparse files that are images,
            if no shard holds an image, a sample holds several to choose from, or some samples lack
            the label that others have. Of a damaged shard the samples before the damage are used,
            and one sentence on stderr names the byte from which the rest is lost.
    """

    def __init__(self, urls: Sequence[str], *, image: str | None = None, label: str | None = None):
        if label not in (None, "", *LABELS):
            raise UserError(f"labels of shards are in {', '.join(LABELS)}, not in {label!r}")
        shards = zip(urls, index_shards(urls), strict=True)
        indices = [index.one_image_each(url, image) for url, index in shards]
        self.urls = PackedStrings(urls)
        self._versions = PackedStrings(index.version for index in indices)
        self._names = PackedStrings.joined([index.names for index in indices])
        self._places = np.concatenate([index.places[:, :2] for index in indices])
        self.blocks = np.array([len(index.places) for index in indices], dtype=np.int64)
        self._ends = np.cumsum(self.blocks)
        kinds = sum((index.kinds for index in indices), Counter[str]())
        used = (*EXTENSIONS, *(f".{kind}" for kind in LABELS))
        self.left_out = {kind: count for kind, count in kinds.items() if not kind.endswith(used)}
        if len(self) == 0:
            found = count_kinds(kinds)
            raise UserError(
                f"no sample of {urls[0]}{' and the others' if len(urls) > 1 else ''} holds an "
                f"image{f' in .{image}' if image else ''}: found {found or 'nothing'}"
            )
        if (labels := self._labels(indices, label)) is not None:
            self.classes, self.labels = number_classes(labels)
        damaged = [(url, index) for url, index in zip(urls, indices, strict=True) if index.damage]
        if damaged:
            url, index = damaged[0]
            others = f" (and {len(damaged) - 1:,} more shards are damaged)" if damaged[1:] else ""
            warn(
                f"{url} is damaged: {index.damage}; the {len(index.places):,} images before are "
                f"used, the rest is lost{others}"
            )

    def __len__(self) -> int:
        return len(self._places)

    def content(self, index: int) -> io.BytesIO:
        """The image's bytes; raises `ImageError` where they cannot be read."""
        shard, name = self._shard(index), self.path(index)
        offset, size = self._places[index].tolist()
        with image_errors(name, "unreadable"):
            content = read_range(self.urls[shard], self._versions[shard], offset, size)
        if len(content) < size:
            raise ImageError(name, f"the shard ends after {len(content)} of its {size} bytes")
        return io.BytesIO(content)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, range(len(self))[index], side="right"))

    def path(self, index: int) -> str:
        """The image's shard and its name in the shard."""
        return f"{self.urls[self._shard(index)]}/{self._names[index]}"

    def identity(self) -> list[bytes]:
        """Names, places and sizes of all images in their shards; not the names of the shards."""
        return [self._names.ends.tobytes(), self._names.text.tobytes(), self._places.tobytes()]

    def _labels(self, indices: Sequence[Index], kind: str | None) -> list[str] | None:
        """The label of each image by its member, if all have one."""
        for name in LABELS if kind is None else [kind] if kind else []:
            if kind is None and not any(len(index.labels[name].text) for index in indices):
                continue
            labels = [label for index in indices for label in index.labels[name]]
            long = CAPTION in labels
            if kind is None and (long or (name == "txt" and len(set(labels)) > len(labels) / 2)):
                continue
            count = len(labels) - labels.count("")
            if long or count < len(labels):
                what = "a text that is no class name" if long else "no label"
                raise UserError(
                    f"{self.path(labels.index(CAPTION if long else ''))} has {what} in .{name}"
                    f"{', but others have' if count and not long else ''}: leave labels out with "
                    "?label="
                )
            return labels
        return None


# ---------------------------------------------------------------------------------- names
def expand(data: str) -> list[str]:
    """The shards that `data` names.

    As in webdataset, `{000..127}` and `{a,b}` stand for several, `::` stands between lists, and
    `${NAME}` for the environment's `WDS_NAME`. A `::` behind a cache of fsspec belongs to the URL:
    `simplecache::s3://bucket/train-{000..127}.tar` caches entire shards on the local disk.

    Raises:
        UserError: for braces that do not fit, or a variable that is not there.
    """
    if os.path.exists(data):  # noqa: PTH110, Path's raises for long ones
        return [data]
    hidden = _CACHE.sub("\\1\0", data)  # webdataset would split at the "::" of a cache
    if not set("{$") & set(data):
        urls = hidden.split("::")
    else:
        with needs_extra("shards", f"expanding {data}"):
            from webdataset.shardlists import expand_urls
        try:
            urls = expand_urls(hidden)
        except (ValueError, AssertionError) as error:
            raise UserError(f"{data} does not name shards: {error}") from None
    return [url.replace("\0", "::") for url in urls]


def shard_settings(data: str) -> tuple[str, dict[str, str]] | None:
    """Shards and settings, or None if `data` is not named like (compressed) shards.

    Raises:
        UserError: for unknown settings of local shards.
    """
    if not _SHARD.search(data.partition("?")[0]):
        return None
    try:
        return split_settings(data, FORM, "shards")
    except UserError:
        if is_remote(data):
            return data, {}  # the query belongs to the URL, as a signature
        raise
