"""Device, precision and ranks: the only file that names `torch.distributed` or `cuda`.

Without a launcher there is no process group: every collective here is then the identity.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino.files import UserError

Precision = Literal["fp32", "bf16"]


# ---------------------------------------------------------------------------------- device
def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, else Apple's MPS, else the CPU.

    Under a launcher, "auto" and "cuda" mean this rank's own GPU.

    Raises:
        UserError: if `name` is unknown or this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("this machine has no CUDA device: use --device cpu")
        if device.index is None:
            device = torch.device("cuda", ranks().local_rank)
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"there is no {device}: this machine has {torch.cuda.device_count()} GPU(s)"
            )
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("this machine has no MPS device: use --device cpu")
    return device


def pick_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """The precision called `name`; "auto" is bf16 on GPUs that have it, fp32 elsewhere.

    There is no fp16: it made users' losses NaN.
    """
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The autocast context of a forward pass; nothing at all for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context inside `autocast` in which nothing is cast: head, loss and center live here."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def memory_errors(images: int, setting: str) -> Iterator[None]:
    """Turn PyTorch's errors about memory, on any device, into one sentence.

    Args:
        images: how many are processed at a time.
        setting: what the user changes for fewer, up to the number: "--batch " or "batch=".
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # a GPU's OutOfMemoryError is a RuntimeError
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(words in str(error) for words in _MEMORY_WORDS):
            raise
        advice = (
            f"take fewer, such as {setting}{images // 2}" if images > 1 else "take a smaller one"
        )
        raise UserError(f"memory is too small for {images} image(s) at a time: {advice}") from None


_MEMORY_WORDS = ("alloc_cpu", "not enough memory", "out of memory")


def keep_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the kernel; False elsewhere.

    On Linux CPUs large tensors are otherwise mapped anew at every allocation, and the page faults
    cost about a sixth of a plain training step (README, "Speed").
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has no such knob
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    kept = mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1)
    return bool(kept and mallopt(m_top_pad, 64 * 2**20))


def describe(device: torch.device) -> str:
    """The device in words, for the provenance of a result."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------------- ranks
@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, and `local_rank` on this host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0


def ranks() -> Ranks:
    """The ranks that the launcher (torchrun, submitit) put into the environment."""
    return Ranks(
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        int(os.environ.get("LOCAL_RANK", 0)),
    )


@contextmanager
def process_group(device: torch.device, timeout_minutes: float = 30.0) -> Iterator[Ranks]:
    """Join the process group of the launcher for the body; without a launcher there is none.

    NCCL for CUDA devices, gloo for all others.
    """
    current = ranks()
    if current.world == 1:
        yield current
        return
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if cuda else None,
    )
    try:
        yield current
    finally:
        dist.destroy_process_group()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place."""
    if _grouped():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensors: Iterable[Tensor]) -> None:
    """Average each of `tensors` over all ranks, in place."""
    if _grouped():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def gather_objects(item: Any) -> list[Any]:
    """`item` of every rank, in rank order, on every rank."""
    if not _grouped():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Wait until every rank has come here."""
    if _grouped():
        dist.barrier()


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Batch norm over all ranks' samples on GPUs (PyTorch has no such thing for CPUs)."""
    if not _grouped() or device.type != "cuda":
        return module
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return converted


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` whose gradients are averaged over the ranks; itself without a process group."""
    if not _grouped():
        return module
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def no_sync(module: nn.Module, skip: bool = True) -> AbstractContextManager[Any]:
    """A context in which backward passes through `module` leave other ranks alone."""
    if skip and isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()
