"""Images a second of one core: decoding and ten crops, ours against the reference's pipeline.

    python benchmarks/data_pipeline.py photos/ --repeats 5

Each image gives 2 x 224 + 8 x 96 pixels. `reference` is the published transform, composed from
torchvision and Pillow as the published code does (main_dino.py:419-464); `lightly` its
`DINOTransform` with the same sizes, if lightly is installed. `ours, worker` is what a worker
process does (decode, crop, resize, flip, in uint8), `ours, all` adds the photometric stage, on the
same core. All run in turn in one process with one thread, over all images, and each round starts
with another one; shown are medians over the rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageFilter, ImageOps
from rich.console import Console
from rich.table import Table
from torchvision import transforms as T

from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD
from dino.data.loader import PretrainLoader
from dino.data.sampler import EpochSampler
from dino.data.sources.open import open_source
from dino.data.views.photometric import augment
from dino.data.views.view_spec import ViewSettings
from dino.runtime import keep_memory

GLOBAL, LOCAL, LOCALS = 224, 96, 8
GLOBAL_SCALE, LOCAL_SCALE = (0.25, 1.0), (0.05, 0.25)


# ------------------------------------------------------------------------------------ the peers
class Blur:
    """Pillow's blur of a random radius, with a probability."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Solarize:
    """Inversion of the upper half of the values, with a probability."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.probability else image


def reference_views() -> list[Callable[[Image.Image], torch.Tensor]]:
    """One transform for each view."""

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float):  # type: ignore[no-untyped-def]
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale=scale, interpolation=Image.BICUBIC),
                T.RandomHorizontalFlip(0.5),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(0.2),
                Blur(blur),
                *([Solarize(solarize)] if solarize else []),
                T.ToTensor(),
                T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    local = view(LOCAL, LOCAL_SCALE, 0.5, 0.0)
    return [
        view(GLOBAL, GLOBAL_SCALE, 1.0, 0.0),
        view(GLOBAL, GLOBAL_SCALE, 0.1, 0.2),
        *[local] * LOCALS,
    ]


def reference(paths: list[Path]) -> Callable[[], None]:
    views = reference_views()

    def run() -> None:
        for path in paths:
            with path.open("rb") as file:
                image = Image.open(file).convert("RGB")
            for view in views:
                view(image)

    return run


def lightly(paths: list[Path]) -> Callable[[], None] | None:
    try:
        from lightly.transforms import DINOTransform
    except ImportError:
        return None
    transform = DINOTransform(
        global_crop_size=GLOBAL,
        global_crop_scale=GLOBAL_SCALE,
        local_crop_size=LOCAL,
        local_crop_scale=LOCAL_SCALE,
        n_local_views=LOCALS,
    )

    def run() -> None:
        for path in paths:
            with path.open("rb") as file:
                transform(Image.open(file).convert("RGB"))

    return run


# ------------------------------------------------------------------------------------ ours
def ours(folder: Path, batch: int, photometric: bool) -> Callable[[], None]:
    """Whole batches as training gets them, without or with the photometric stage."""
    source = open_source(folder)
    specs = ViewSettings(
        global_size=GLOBAL,
        global_scale=GLOBAL_SCALE,
        local_count=LOCALS,
        local_size=LOCAL,
        local_scale=LOCAL_SCALE,
    ).specs()

    def run() -> None:
        steps = len(source) // batch
        sampler = EpochSampler(len(source), batch, stop_step=steps)
        for step in PretrainLoader(source, specs, sampler, seed=0):
            if photometric:
                for group in step.groups:
                    augment(
                        group.images.flatten(0, 1),
                        group.params.flatten(0, 1),
                        IMAGENET_MEAN,
                        IMAGENET_STD,
                    )

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()  # as training does; all of them profit
    random.seed(0)
    torch.manual_seed(0)
    source = open_source(args.folder)
    paths = [Path(source.path(index)) for index in range(len(source) // args.batch * args.batch)]
    runs = {
        "reference": reference(paths),
        "lightly": lightly(paths),
        "ours, worker": ours(args.folder, args.batch, False),
        "ours, all": ours(args.folder, args.batch, True),
    }
    runs = {name: run for name, run in runs.items() if run is not None}
    for run in runs.values():  # files into the page cache, code compiled
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(args.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            started = time.perf_counter()
            runs[name]()
            seconds[name].append((time.perf_counter() - started) / len(paths))
    table = Table("pipeline, one core", "ms / image", "images / s", "x reference", "x lightly")
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in middle.items():
        table.add_row(
            name,
            f"{1e3 * value:.2f}",
            f"{1 / value:.1f}",
            f"{middle['reference'] / value:.2f}",
            f"{middle['lightly'] / value:.2f}" if "lightly" in middle else "-",
        )
    console = Console(width=100)
    console.print(table)
    console.print(machine(), f"{len(paths)} images, median of {args.repeats} rounds")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return f"{model}, torch {torch.__version__}, Pillow {Image.__version__};"


if __name__ == "__main__":
    main()
