"""Equality on a GPU: golden numbers, steps against the CPU, compile, NCCL, checkpoints, no waiting.

    python benchmarks/gpu/exactness.py --out exactness.jsonl

Each check prints the largest relative difference and its bar. The exit status is 1 if one lies
above its bar, 3 if the time was used up (the same command continues), else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dino
from dino.data.images.pixel_format import IMAGENET_MEAN, IMAGENET_STD
from dino.data.loader import PretrainLoader
from dino.data.sampler import EpochSampler
from dino.data.sources.torch_dataset import TorchDataset
from dino.data.views.photometric import augment, normalize, photometric_
from dino.data.views.view_spec import ViewSettings
from dino.runtime import pick_device, pick_precision, ranks
from dino.train.checkpoint import Checkpoints, RunState

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.golden_set import (
    golden_distillation,
    golden_head,
    golden_steps,
    golden_vit,
    manifest,
    part,
    tensors,
)
from rows import UNFINISHED, Rows, arguments, machine
from trainings import (
    CPU,
    DOUBLE,
    FLOAT,
    Place,
    difference,
    distillation,
    largest,
    reference,
    state,
    steps_of,
    train,
)

SECONDS = 90
"""No check takes longer on a GPU with 16 CPU cores."""
ARCHS = ("vit_small", "resnet50")
BARS = {
    **{("vit_small", DOUBLE): 1e-9, ("vit_small", FLOAT): 1e-3},
    **{("resnet50", DOUBLE): 1e-6, ("resnet50", FLOAT): 1e-2},
}
"""For the state after some steps. A single product differs by 1e-16 and 1e-7, and a step adds up
many of them; TF32 (1e-3 for one product) is off. The batch norms of an untrained ResNet-50 with few
images amplify rounding a million times (float32 against float64 on a CPU: gradients of one step
differ by 17 %): of it, in float32, only losses and center are compared."""


class Difference(NamedTuple):
    """The largest relative difference of something, its bar, and where it is."""

    what: str
    difference: float
    bar: float
    where: str = ""


Check = Callable[[Place], Iterator[Difference]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


# ---------------------------------------------------------------------------------- checks
def losses(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a state, the losses and the center."""
    return {name: value for name, value in state.items() if name.startswith("loss|")}


@check
def golden_numbers(place: Place) -> Iterator[Difference]:
    """The published code's networks and training, on the device."""
    device = place.device
    for dtype, bar in ((DOUBLE, 1e-9), (FLOAT, 1e-4)):
        kind = str(dtype).removeprefix("torch.")
        vit = tensors("vit.safetensors")
        network = golden_vit(part(vit, "state.")).to(device, dtype)
        for height, width in manifest()["config"]["input_sizes"]:
            expected = part(vit, f"{height}x{width}.")
            cls = network(expected["image"].to(device, dtype))
            (cls * expected["probe"].to(device, dtype)).sum().backward()
            yield Difference(
                f"CLS, {height} x {width}, {kind}", difference(cls, expected["cls"]), bar
            )
            fc1 = network.blocks[0].mlp.fc1.weight
            found = difference(fc1.grad, expected["grad_first_fc1"])
            yield Difference(f"gradient of fc1, {height} x {width}, {kind}", found, bar)
            network.zero_grad()
        for variant in ("fixed_norm", "free_norm"):
            golden = part(tensors("head.safetensors"), f"{variant}.")
            head = golden_head(golden, fixed_norm=variant == "fixed_norm").to(device, dtype)
            output = head(golden["input"].to(device, dtype))
            yield Difference(f"head, {variant}, {kind}", difference(output, golden["output"]), bar)
    golden = tensors("training.safetensors")
    for micro_batch in (None, 3):
        trained = golden_distillation(golden, micro_batch, True, device)
        losses = [
            trained.step([group.to(device) for group in groups], step).loss.cpu()
            for step, groups in enumerate(golden_steps(golden))
        ]
        expected = torch.tensor(manifest()["training"]["losses"], dtype=DOUBLE)
        what = f"training, float64, micro-batch {micro_batch or 'off'}"
        yield Difference(f"{what}: losses", difference(torch.stack(losses), expected), 1e-9)
        final = {f"student|{k}": v for k, v in trained.student.state_dict().items()}
        final |= {f"teacher|{k}": v for k, v in trained.teacher.state_dict().items()}
        names = {name: name.replace("|", ".") for name in final}
        target = {name: golden[f"final.{key}"] for name, key in names.items()}
        yield Difference(f"{what}: weights", largest(final, target)[0], 1e-9)


def _steps(place: Place, arch: str, dtype: torch.dtype) -> Iterator[Difference]:
    """One training on the device, carried out in several ways, against one on the CPU."""
    variants: dict[str, dict[str, Any]] = {"all at once": {"streamed": False}}
    if arch.startswith("vit"):
        variants |= {"streamed": {}, "micro-batches of 3": {"micro_batch": 3}}
    expected, steps = reference(place, arch, dtype), steps_of(place, arch)
    for name, options in variants.items():
        trained = distillation(place, arch, dtype, place.device, **options)
        ours, theirs, what = train(place, trained, dtype, steps), expected, "all"
        if (arch, dtype) == ("resnet50", FLOAT):
            ours, theirs, what = losses(ours), losses(theirs), "losses and center"
        found = largest(ours, theirs)
        yield Difference(f"{name}: {what}", *_barred(found, BARS[arch, dtype]))


for _arch, _dtype in product(ARCHS, (DOUBLE, FLOAT)):
    _name = f"steps of {_arch} in {str(_dtype).removeprefix('torch.')} as on the CPU"
    CHECKS[_name] = partial(_steps, arch=_arch, dtype=_dtype)


def drawn_crops(place: Place) -> Iterator[tuple[Tensor, Tensor]]:
    """Crops of random images and their photometric parameters, for each size of view."""
    count, side = place.pick((64, 300), (8, 48))
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, side, side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    settings = ViewSettings(
        global_size=place.pick(224, 32), local_size=place.pick(96, 16), local_count=4
    )
    sampler = EpochSampler(count, count, stop_step=1)
    (batch,) = PretrainLoader(TorchDataset(list(images)), settings.specs(), sampler, seed=0)
    for group in batch.groups:
        yield group.images.flatten(0, 1), group.params.flatten(0, 1)


@check
def photometric_stage(place: Place) -> Iterator[Difference]:
    """Views with all operations; a value on the threshold of solarize may fall on either side."""
    for images, params in drawn_crops(place):
        expected = normalize(photometric_(images.float(), params), IMAGENET_MEAN, IMAGENET_STD)
        args = (images.to(place.device), params.to(place.device), IMAGENET_MEAN, IMAGENET_STD)
        apart = (augment(*args).cpu() - expected).abs() / expected.abs().max()
        name, flipped = f"{images.shape[-1]} px", apart > 1e-3
        share = flipped.float().mean().item()
        yield Difference(f"{name}: share of values above 1e-3", share, 1e-4)
        yield Difference(f"{name}: the other values", apart[~flipped].max().item(), 1e-3)


@check
def compiled_as_eager(place: Place) -> Iterator[Difference]:
    """Backbones by torch.compile (the tiny check traces only, it compiles nothing)."""
    backend = place.pick("inductor", "aot_eager")
    precisions: list[Any] = ["fp32"]
    if pick_precision("auto", place.device) == "bf16":
        precisions.append("bf16")
    for precision in precisions:
        states = []
        for compiled in (False, True):
            trained = distillation(place, "vit_small", FLOAT, place.device, precision=precision)
            if compiled:
                for network in (trained.student, trained.teacher):
                    network.backbone.compile(backend=backend, dynamic=False)
            states.append(train(place, trained, FLOAT, range(2)))
        eager, ours = states
        if precision == "bf16":  # eight bits: the losses only
            eager, ours = losses(eager), losses(ours)
        bar = {"fp32": BARS["vit_small", FLOAT], "bf16": 2e-2}[precision]
        yield Difference(f"vit_small, {precision}, {backend}", *_barred(largest(ours, eager), bar))


def _barred(found: tuple[float, str], bar: float) -> tuple[float, float, str]:
    return found[0], bar, found[1]


@check
def one_rank_of_torchrun_as_none(place: Place) -> Iterator[Difference]:
    """DistributedDataParallel and all reductions with one rank: NCCL on a GPU, gloo on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        words = [__file__, "--as-rank", "--out", folder, "--device", place.device.type]
        command = [sys.executable, "-m", *launcher, *words, *["--tiny"] * place.tiny]
        subprocess.run(command, check=True, timeout=SECONDS + 30)
        found = {arch: load_file(Path(folder) / arch) for arch in ARCHS}
    for arch, ours in found.items():
        trained = distillation(place, arch, DOUBLE, place.device)
        expected = train(place, trained, DOUBLE, steps_of(place, arch))
        apart = largest(ours, expected)
        what = f"{arch}, float64, {backend_of(place.device)}"
        yield Difference(what, *_barred(apart, BARS[arch, DOUBLE]))


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def as_a_rank(place: Place, folder: Path) -> None:
    """What torchrun starts: some steps of each network in a process group, and their states."""
    dist.init_process_group(backend_of(place.device))  # dino starts none for one process
    try:
        for arch in ARCHS:
            trained = distillation(place, arch, DOUBLE, place.device, ranks=ranks())
            save_file(train(place, trained, DOUBLE, steps_of(place, arch)), folder / arch)
    finally:
        dist.destroy_process_group()


class HostReads(TorchDispatchMode):
    """Notes where values of tensors are read by the host: `item`, `bool`, masks as indices."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.places.append(f"{func.name()} at {innermost(traceback.extract_stack())}")
        return func(*args, **(kwargs or {}))


def innermost(stack: traceback.StackSummary) -> str:
    """File and line of the last frame inside the package."""
    root = Path(dino.__file__).parent
    frames = [frame for frame in stack if root in Path(frame.filename).parents]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "torch"


@check
def no_step_waits_for_the_device(place: Place) -> Iterator[Difference]:
    """`distillation.step` after a warm-up; on a GPU also with the photometric stage before it."""
    precision = pick_precision("auto", place.device)
    crops = [(a.to(place.device), b.to(place.device)) for a, b in drawn_crops(place)]
    batch = place.pick(64, 8)
    trained = distillation(place, "vit_small", FLOAT, place.device, precision=precision)

    def prepared() -> list[Tensor]:
        done = [augment(i, p, IMAGENET_MEAN, IMAGENET_STD) for i, p in crops]
        return [views.unflatten(0, (-1, batch)) for views in done]

    for step in range(2):
        trained.step(prepared(), step)
    groups = prepared()
    with HostReads() as reads:
        trained.step(groups, 2)
    what = "reads by the host in a step"
    yield Difference(what, len(reads.places), 0, ", ".join(sorted(set(reads.places))))
    if place.device.type == "cuda":
        found, where = 0, ""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trained.step(prepared(), 3)
        except RuntimeError as error:
            found, where = 1, f"{innermost(traceback.extract_tb(error.__traceback__))}: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield Difference("synchronisations of photometric stage and step", found, 0, where)


@check
def checkpoints_from_device_to_cpu_and_back(place: Place) -> Iterator[Difference]:
    """Saved after two steps and resumed on the other device: the same bits, then close."""
    for source, target in pairwise((place.device, CPU, place.device)):
        name = f"{source.type} to {target.type}"
        saved = distillation(place, "vit_small", DOUBLE, source)
        train(place, saved, DOUBLE, range(2))
        resumed = distillation(place, "vit_small", DOUBLE, target)
        train(place, resumed, DOUBLE, range(5, 6))  # other weights, other moments
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(folder))
            path = checkpoints.save(saved, RunState(2))
            checkpoints.restore(resumed, path)
        both = [state(trained, []) for trained in (resumed, saved)]
        weights = [{n: v for n, v in one.items() if "gradient" not in n} for one in both]
        yield Difference(f"{name}, restored", *_barred(largest(*weights), 0))
        after = [train(place, d, DOUBLE, range(2, 4)) for d in (resumed, saved)]
        yield Difference(f"{name}, two steps later", *_barred(largest(*after), 1e-9))


# ---------------------------------------------------------------------------------- command
def run(place: Place, rows: Rows) -> bool:
    """Run the checks that are not in the file; whether all are now."""
    about = {**machine(place.device), "tiny": place.tiny}
    for name, function in CHECKS.items():
        if rows.find(check=name, **about):
            continue
        if rows.seconds < SECONDS:
            return False
        print(name, flush=True)
        started = time.perf_counter()
        try:
            found = list(function(place))
        except Exception:
            traceback.print_exc()
            reason = traceback.format_exc().splitlines()[-1][:200]
            found = [Difference("stopped with an error", float("inf"), 0, reason)]
        differences = [difference._asdict() for difference in found]
        seconds = round(time.perf_counter() - started, 1)
        rows.add(check=name, **about, seconds=seconds, differences=differences)
    return True


def print_table(rows: list[dict[str, Any]]) -> int:
    """One line a difference; returns how many lie above their bars."""
    table = Table("check", "what", "largest relative difference", "bar")
    table.add_column(overflow="fold")  # places are never cut
    above = 0
    for row in rows:
        for number, line in enumerate(row["differences"]):
            good = line["difference"] <= line["bar"]
            above += not good
            verdict = "" if good else f"ABOVE  {line['where']}"
            cells = (f"{line['difference']:.1e}", f"{line['bar']:.0e}", verdict)
            table.add_row("" if number else row["check"], line["what"], *cells)
    Console(width=150).print(table)
    return above


def main() -> None:
    parser = arguments(__doc__, "exactness.jsonl")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    place = Place(pick_device(args.device), args.tiny)
    if args.as_rank:
        as_a_rank(place, args.out)
        return
    rows = Rows(args.out, args.minutes)
    complete = run(place, rows)
    above = print_table(rows.find(**machine(place.device), tiny=place.tiny))
    print(f"{machine(place.device)}; {above} above their bars; rows in {args.out}")
    if not complete:
        print("the time is used up: the same command continues")
    sys.exit(1 if above else 0 if complete else UNFINISHED)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
