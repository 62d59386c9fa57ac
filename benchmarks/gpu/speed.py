"""Images/s, share of the card's peak, data wait and memory of a training step, ours and plain.

    python benchmarks/gpu/speed.py --data imagenet/train --out speed.jsonl

ViT-S/16 and ViT-B/16, 2 x 224 + 8 x 96 pixels, K = 65536. Every case is a process of its own and
becomes a row of the file; what is there is not measured again, so that the same command continues
(exit status 3: not all cases are measured yet). The peak is that of a large bf16 product on the
same card; FLOPs are those that a step does, counted by PyTorch. Views are uint8 crops that lie on
the device, or with `--data` those of real images through the loader; both networks get them through
our photometric stage.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from plain_dino import PlainDINO
from rows import UNFINISHED, Rows, arguments, machine

from dino.data.loader import PretrainLoader, ViewGroup
from dino.data.sampler import EpochSampler
from dino.data.sources.open import open_source
from dino.data.views.photometric import augment
from dino.data.views.random_streams import draw_views, generator
from dino.runtime import Ranks, default_workers, keep_memory, pick_device
from dino.train.build import build
from dino.train.config import PretrainConfig
from dino.train.recipes import vanilla

LIMIT = 240
"""Seconds for one case, most of which torch.compile takes."""
TINY = {
    **{"views.global_size": 32, "views.local_size": 16, "views.local_count": 2},
    **{"model.embed_dim": 48, "model.depth": 2, "model.heads": 2},
    **{"head.prototypes": 64, "head.hidden": 32, "head.bottleneck": 16},
}
PRECISIONS = ("bf16", "bf16+tf32", "fp32", "tf32")
"""bf16: autocast, with head and loss in fp32; +tf32: fp32 products on the tensor cores."""


@dataclass(frozen=True)
class Case:
    who: str
    arch: str
    precision: str
    compiled: bool
    batch: int
    views: str = "crops"


def cases(data: bool, tiny: bool) -> Iterator[Case]:
    """The most important first."""
    views = "loader" if data else "crops"
    if tiny:
        yield Case("ours", "vit_small", "bf16", True, 4, views)
        yield Case("plain", "vit_small", "fp32", False, 4)
        return
    networks = ("vit_small", "vit_base")
    for arch, compiled, batch in product(networks, (False, True), (128, 32, 256)):
        yield Case("ours", arch, "bf16", compiled, batch)
    for arch, compiled in product(networks, (False, True)):
        yield Case("plain", arch, "bf16", compiled, 128)
        if data:
            yield Case("ours", arch, "bf16", compiled, 128, "loader")
    for arch, precision, compiled in product(networks, PRECISIONS[1:], (False, True)):
        yield Case("ours", arch, precision, compiled, 128)
        if precision != "bf16+tf32" and not compiled:
            yield Case("plain", arch, precision, compiled, 128)


# ---------------------------------------------------------------------------------- one case
def settings(case: Case, tiny: bool) -> PretrainConfig:
    bf16 = case.precision.startswith("bf16")
    changes = {
        "model.arch": case.arch,
        "run.batch": case.batch,
        "execution.precision": "bf16" if bf16 else "fp32",
    }
    return vanilla().changed({**changes, **(TINY if tiny else {})})


def stepper(
    case: Case, config: PretrainConfig, device: torch.device, backend: str
) -> Callable[[list[Tensor]], object]:
    """A function that does one step."""
    torch.manual_seed(0)
    if case.who == "ours":
        trained = build(config, config.schedules(100), device, Ranks())
        steps = iter(range(200, 100_000))  # past the last layer's freeze
        networks, step = (trained.student.backbone, trained.teacher.backbone), trained.step

        def run(groups: list[Tensor]) -> object:
            return step(groups, next(steps))
    else:
        model, (width, heads) = config.model, {"vit_base": (768, 12)}.get(case.arch, (384, 6))
        plain = PlainDINO(
            config.head.prototypes,
            width=model.embed_dim or width,
            depth=model.depth or 12,
            heads=model.heads or heads,
            size=config.views.global_size,
            device=device,
            bf16=case.precision.startswith("bf16"),
        )
        networks = (plain.student[0], plain.teacher[0])

        def run(groups: list[Tensor]) -> object:
            return plain.step([view for group in groups for view in group])

    if case.compiled:
        for network in networks:
            network.compile(backend=backend, dynamic=False)
    return run


def crops(config: PretrainConfig, device: torch.device) -> Iterator[list[ViewGroup]]:
    """The same random crops on the device again and again, with drawn photometric parameters."""
    batch, groups = config.run.batch, {}
    drawn = [
        draw_views(config.views.specs(), 256, 256, generator(0, 0, index)) for index in range(batch)
    ]
    rows = torch.tensor([[view.row() for view in views] for views in drawn]).transpose(0, 1)
    first = 0
    for size, count in ((config.views.global_size, 2), (config.views.local_size, len(rows) - 2)):
        images = torch.randint(0, 256, (count, batch, 3, size, size), dtype=torch.uint8)
        groups[size] = ViewGroup(images, rows[first : first + count]).to(device)
        first += count
    while True:
        yield list(groups.values())


def loader(config: PretrainConfig, device: torch.device, data: Path) -> Iterator[list[ViewGroup]]:
    """Views of real images, as training reads them."""
    source = open_source(data)
    sampler = EpochSampler(len(source), config.run.batch)
    pin = device.type == "cuda"
    batches = PretrainLoader(
        source, config.views.specs(), sampler, seed=0, workers=default_workers(), pin=pin
    )
    for batch in batches:
        yield [group.to(device) for group in batch.groups]


def float_views(groups: list[ViewGroup], config: PretrainConfig) -> list[Tensor]:
    found = []
    for group in groups:
        images, params = group.images.flatten(0, 1), group.params.flatten(0, 1)
        flat = augment(images, params, config.pixels.mean, config.pixels.std)
        found.append(flat.unflatten(0, group.images.shape[:2]))
    return found


def flop_counter() -> FlopCounterMode:
    """PyTorch's, which does not know the product that adds in place."""

    def product_flop(_: Any, a: list[int], b: list[int], **__: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    mapping = {torch.ops.aten.addmm_: product_flop}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Images/s, FLOPs of an image, data wait and peak memory."""
    device = pick_device(args.device)
    tf32 = "tf32" in case.precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    keep_memory()
    config = settings(case, args.tiny)
    small = config.changed({"run.batch": 2})
    eager = stepper(Case(**{**asdict(case), "compiled": False}), small, device, "")
    views = float_views(next(crops(small, device)), small)
    with flop_counter() as counter, sdpa_kernel(SDPBackend.MATH):  # plain products, all counted
        eager(views)
    del eager, views
    step = stepper(case, config, device, "aot_eager" if args.tiny else "inductor")
    batches = crops(config, device) if case.views == "crops" else loader(config, device, args.data)
    warmup, steps = (1, 2) if args.tiny else (5, 30)
    for _ in range(warmup):
        step(float_views(next(batches), config))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    waited, started = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        groups = next(batches)
        waited += time.perf_counter() - before
        step(float_views(groups, config))
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - started
    return {
        "images_per_s": steps * case.batch / seconds,
        "flop_per_image": counter.get_total_flops() / 2,
        "data_wait": waited / seconds,
        "peak_bytes": peak,
    }


def peak_flops(device: torch.device, tiny: bool) -> float:
    """FLOP/s of a large bf16 product: the median of the better half of 20."""
    size = 256 if tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(sorted(seconds)[:10])


# ---------------------------------------------------------------------------------- all cases
def child(case: Case, args: argparse.Namespace, seconds: float) -> dict[str, Any] | None:
    """Measure a case in a process of its own; why it failed if it does; None if time is up."""
    limit = min(LIMIT, seconds)
    words = ["--case", json.dumps(asdict(case)), "--device", args.device]
    words += ["--tiny"] * args.tiny + (["--data", str(args.data)] if args.data else [])
    command = [sys.executable, __file__, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT} s"} if limit == LIMIT else None
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def print_table(rows: Rows, about: dict[str, Any]) -> None:
    columns = ("network", "precision", "compile", "views", "batch", "who")
    numbers = ("images/s", "GFLOP/image", "share of peak", "data wait", "peak GiB")
    table = Table(*columns, *numbers)
    peak = rows.find(**about, measure="peak")[0]["flops"]
    for row in rows.find(**about, measure="case"):
        case = Case(**row["case"])
        first = (case.arch, case.precision, "yes" if case.compiled else "no", case.views)
        if "error" in row:
            table.add_row(*first, str(case.batch), case.who, row["error"])
            continue
        speed, flop = row["images_per_s"], row["flop_per_image"]
        table.add_row(
            *(*first, str(case.batch), case.who, f"{speed:.0f}", f"{flop / 1e9:.3g}"),
            f"{speed * flop / peak:.1%}",
            *(f"{row['data_wait']:.1%}", f"{row['peak_bytes'] / 2**30:.1f}"),
        )
    console = Console(width=130)
    console.print(table)
    console.print(f"{about['machine']}, torch {about['torch']}, peak {peak / 1e12:.2f} TFLOP/s")


def main() -> None:
    parser = arguments(__doc__, "speed.jsonl")
    parser.add_argument("--data", type=Path, help="a folder of images; without it crops only")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)), args)))
        return
    device = pick_device(args.device)
    about = {**machine(device), "tiny": args.tiny}
    rows = Rows(args.out, args.minutes)
    if not rows.find(**about, measure="peak"):
        rows.add(**about, measure="peak", flops=peak_flops(device, args.tiny))
    for case in cases(args.data is not None, args.tiny):
        if rows.find(**about, case=asdict(case)):
            continue
        print(case, flush=True)
        row = child(case, args, rows.seconds) if rows.seconds > 0 else None
        if row is None:
            print_table(rows, about)
            print(f"{args.out} is not complete: the same command continues")
            sys.exit(UNFINISHED)
        rows.add(**about, measure="case", case=asdict(case), **row)
    print_table(rows, about)
    print(f"rows in {args.out}")


if __name__ == "__main__":
    main()
