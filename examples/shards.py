"""Pack a folder of images into tar shards, and pretrain on them.

    python examples/shards.py --images photos/ --shards shards/ --out runs/photos

Use shards for images in object stores, on hard disks, or on file systems that are slow with
millions of small files. Webdataset writes them here; any uncompressed tar with members KEY.jpg and
KEY.cls works.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

import dino
from dino.data.sources.open import Folder


def pack(images: Folder, target: Path, per_shard: int) -> str:
    """Copy the files into shards in random order; return the pattern that names all shards.

    Training reads 16 shards at a time, so a shard should not hold a single class. Some hundred to
    some thousand images a shard, and at least a few times 16 shards, mix well.
    """
    target.mkdir(parents=True, exist_ok=True)
    pattern = str(target / "train-%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as sink:
        for number, index in enumerate(np.random.default_rng(0).permutation(len(images))):
            file = Path(images.path(index))
            sample: dict[str, Any] = {
                "__key__": f"{number:08}",
                file.suffix.lower().lstrip("."): file.read_bytes(),
            }
            if images.labels is not None and images.classes is not None:
                sample["txt"] = images.classes[images.labels[index]]
            sink.write(sample)
        last = sink.shard - 1
    return str(target / f"train-{{00000..{last:05}}}.tar")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="a folder of images")
    parser.add_argument("--shards", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--out", required=True, help="the run folder")
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--recipe", default="small_data")
    parser.add_argument("--set", type=json.loads, default={}, help='such as {"run.batch": 32}')
    given = parser.parse_args()

    name = pack(Folder(given.images), given.shards, given.per_shard)
    print(f"dino pretrain {given.recipe} --data '{name}' --out {given.out}")
    result = dino.pretrain(given.recipe, data=name, out=given.out, settings=given.set)
    print(f"{result.step} steps, k-NN {result.measured or 'not measured'}, {result.run}")


if __name__ == "__main__":
    main()
