"""Features a second of ViT-S/16 at 224 px: ours against timm, transformers, onnxruntime, OpenVINO.

    pip install timm transformers onnx onnxruntime onnxscript openvino
    python benchmarks/features.py --precision fp32 --threads 2 --repeats 3

All compute the CLS token of the same weights (drawn from a seed, moved by our own exports) for the
same batch of normalised images; each row's largest difference from ours in fp32, relative to the
largest value, stands beside its speed. Every measurement is a process of its own, in turn; rates
are the best of `--repeats` processes, each the median of its batches. In bf16 PyTorch runs under
autocast, OpenVINO with that hint, and onnxruntime, which has no such mode on CPUs, is left out. Who
is not installed is left out by name.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import dino
from dino.features.command import number_table
from dino.models.backbone import Backbone

SIZE, WARM_UP = 224, 2
NEEDS = {
    "ours": (),
    "ours, compiled": (),
    "timm": ("timm",),
    "transformers": ("transformers",),
    "onnxruntime": ("onnxruntime", "onnxscript"),
    "OpenVINO": ("openvino", "onnxscript"),
}
Features = Callable[[Tensor], np.ndarray]


def network() -> Backbone:
    torch.manual_seed(0)
    return dino.create("vit_small", patch_size=16).eval()


def exported(folder: Path) -> dict[str, Path]:
    """Our network in the files of each peer."""
    from dino.weights.export.command import Export, write
    from dino.weights.load import save

    backbone, weights = network(), folder / "weights.safetensors"
    found = {"timm": folder / "timm", "transformers": folder / "hf", "onnx": folder / "vit.onnx"}
    save(backbone, weights, {})
    for name, out in found.items():
        needed = {"onnx": "onnxruntime"}.get(name, name)
        if all(find_spec(module) for module in NEEDS[needed]):
            write(backbone, Export(weights=str(weights), format=name, out=out))  # type: ignore[arg-type]
    return found


def features(who: str, folder: Path, precision: str, threads: int) -> Features:
    """The function to time."""
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()

    def of_torch(module: Callable[[Tensor], Tensor]) -> Features:
        def compute(images: Tensor) -> np.ndarray:
            with torch.inference_mode(), mixed:
                return module(images).float().numpy()

        return compute

    if who == "ours":
        return of_torch(network())
    if who == "ours, compiled":
        return of_torch(torch.compile(network()))
    if who == "timm":
        import timm

        return of_torch(timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval())
    if who == "transformers":
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder / "hf", add_pooling_layer=False).eval()
        return of_torch(lambda images: model(images).last_hidden_state[:, 0])
    if who == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            folder / "vit.onnx", options, providers=["CPUExecutionProvider"]
        )
        return lambda images: session.run(["cls"], {"images": images.numpy()})[0]
    import openvino

    compiled = openvino.Core().compile_model(
        folder / "vit.onnx",
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    return lambda images: compiled(images.numpy())["cls"]


def measure(who: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One process: load, warm up, time; the difference from ours in fp32."""
    torch.set_num_threads(args.threads)
    images = torch.randn(args.batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    compute = features(who, folder, args.precision, args.threads)
    for _ in range(WARM_UP):
        found = compute(images)
    with torch.inference_mode():
        expected = network()(images).numpy()
    seconds = []
    for _ in range(args.batches):
        started = time.perf_counter()
        compute(images)
        seconds.append(time.perf_counter() - started)
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    return {"rate": args.batch / statistics.median(seconds), "difference": float(difference)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=5, help="timed batches of a process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--who", choices=NEEDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.who:
        print(json.dumps(measure(args.who, args.folder, args)))
        return
    console = Console()
    there = [who for who, needs in NEEDS.items() if all(map(find_spec, needs))]
    if args.precision == "bf16":
        there.remove("onnxruntime")
    if missing := NEEDS.keys() - there:
        console.print(f"left out: {', '.join(sorted(missing))}")
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in there}
    with tempfile.TemporaryDirectory() as name:
        exported(Path(name))
        command = [sys.executable, __file__, "--folder", name, *sys.argv[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        for _ in range(args.repeats):
            for who, results in runs.items():
                done = subprocess.run(
                    [*command, "--who", who],
                    capture_output=True,
                    text=True,
                    timeout=1200,
                    env=environment,
                )
                if done.returncode:
                    sys.exit(f"{who}: {done.stderr}")
                results.append(json.loads(done.stdout.splitlines()[-1]))
    rate = {who: max(one["rate"] for one in results) for who, results in runs.items()}
    rows = {
        who: [
            f"{rate[who]:.1f}",
            f"{rate['ours'] / rate[who]:.2f}",
            f"{results[0]['difference']:.0e}",
        ]
        for who, results in runs.items()
    }
    columns = ["", "images/s", "ours against it", "difference from ours in fp32"]
    console.print(number_table(f"ViT-S/16, {SIZE} px, {args.precision}", columns, rows))
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((x.split(":")[1].strip() for x in lines if "model name" in x), "")
    flags = next((x for x in lines if x.startswith("flags")), "").split()
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    console.print(f"{processor} ({' '.join(sets)}), {args.threads} threads, batch {args.batch}")


if __name__ == "__main__":
    main()
