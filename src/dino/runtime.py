"""Device, precision and ranks: with `rendezvous` all that names `torch.distributed` or `cuda`.

Without a launcher there is no process group, and every collective operation is the identity.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino import cgroups, rendezvous
from dino.files import UserError, disk_errors

Precision = Literal["fp32", "bf16"]


# ---------------------------------------------------------------------------------- device
def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, else Apple's MPS, else the CPU.

    Under a launcher, "auto" and "cuda" mean the GPU of this rank's `LOCAL_RANK`.

    Raises:
        UserError: if `name` is unknown or this machine does not have it.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("this machine has no CUDA device: use --device cpu")
        if device.index is None:
            device = torch.device("cuda", ranks().local_rank)
        if device.index >= (count := torch.cuda.device_count()):
            raise UserError(f"there is no {device}: this machine has {count} GPU(s)")
        torch.cuda.set_device(device)
    if device.type == "mps" and not mps:
        raise UserError("this machine has no MPS device: use --device cpu")
    return device


def pick_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """The precision called `name`; "auto" is bf16 on GPUs and CPUs that have it, else fp32.

    CPUs have it with AVX512-BF16 or AMX; others compute bf16 more slowly than fp32. fp16 is not
    offered: with it users' losses became NaN.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and cpu else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The autocast context of a forward pass; no autocast for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context inside `autocast` without casts: head, loss and center are computed in it."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def memory_errors(option: str) -> Iterator[None]:
    """Turn the errors of Python and PyTorch about memory, on any device, into one sentence.

    Raises:
        UserError: to lower `option`, such as "--batch".
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # a GPU's OutOfMemoryError is a RuntimeError
        text = str(error).lower()
        words = ("alloc_cpu", "can't allocate memory", "not enough memory", "out of memory")
        if not (isinstance(error, MemoryError) or any(word in text for word in words)):
            raise
        raise UserError(f"the memory does not suffice: set a smaller {option}") from error


def keep_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel; nothing elsewhere.

    On Linux CPUs large tensors are otherwise mapped anew at every allocation, and the page faults
    cost about a sixth of a plain training step (README, "Speed").
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no mallopt
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
            for parameter, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 2**26)):
                mallopt(parameter, value)


def describe(device: torch.device) -> str:
    """The device's name, for the provenance of a result."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


ONEDNN_LINEAR = True
"""The switch of `dino.models.cpu_linear`: large fp32 linear layers by oneDNN's convolution.

A training step is then 1.10 times as fast for ViT-S/16 with 8 images and 1.13 times as fast for the
demo (AMD EPYC with AVX512, two threads, torch 2.14; median over pairs of alternating steps).
"""


def cores() -> int:
    """Processor cores that this process may use: its affinity, and its control group's quota."""
    affinity = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    return min(count, cgroups.cpu_quota() or count)


CPU_TIMES = Path("/proc/stat")
"""What each core has done since the start of the machine (Linux)."""


def busy_cores(seconds: float = 0.25) -> float:
    """How many of the cores of this process others use, while it sleeps; 0 if that is unknown."""
    before = _cpu_times()
    time.sleep(seconds)
    shares = [
        (busy - before[core][0]) / max(1, total - before[core][1])
        for core, (busy, total) in _cpu_times().items()
        if core in before
    ]
    return sum(shares)


def _cpu_times() -> dict[str, tuple[int, int]]:
    """Busy and total ticks of each core that this process may use."""
    found = {}
    with suppress(OSError, ValueError, AttributeError):
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        for line in CPU_TIMES.read_text().splitlines():
            name, *ticks = line.split()
            if name in mine:
                total = sum(map(int, ticks[:8]))
                found[name] = (total - int(ticks[3]) - int(ticks[4]), total)
    return found


def default_workers() -> int:
    """Processes that read images for this rank: at most 16, with one core left for training."""
    return min(16, max(1, cores() // ranks().local_world - 1))


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory of the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take; None where the system does not say.

    On a CPU the least of what the machine has available, the control groups' limits and the limit
    of the address space (`ulimit -v`) leave.
    """
    if device.type == "cuda":
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved - used
    available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    if available is None:
        return None
    free = [available]
    if (left := cgroups.memory_left()) is not None:
        free.append(left)
    with suppress(ImportError):
        import resource

        limit, size = resource.getrlimit(resource.RLIMIT_AS)[0], _kilobytes(STATUS, "VmSize")
        if limit != resource.RLIM_INFINITY and size is not None:
            free.append(limit - size)
    return max(0, min(free))


STATUS = Path("/proc/self/status")


def _kilobytes(path: Path, name: str) -> int | None:
    """The bytes that a line such as `name:  123 kB` of a file of Linux states."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process holds now, on its device; 0 if unknown. Resets `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # not every container lets a process reset its mark
        Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes(STATUS, "VmRSS") or 0


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most since `memory_in_use`; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(STATUS, "VmHWM") or 0


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# ---------------------------------------------------------------------------------- ranks
@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, and `local_rank` of `local_world` on this host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0


def ranks() -> Ranks:
    """The ranks in the environment, as a launcher (torchrun, submitit) sets it.

    Raises:
        UserError: if variables are missing, are no integers or contradict each other.
    """

    def variable(name: str, default: int) -> int:
        try:
            return int(os.environ.get(name, default))
        except ValueError:
            raise wrong(f"{name}={os.environ[name]} is no integer") from None

    def wrong(problem: str) -> UserError:
        advice = "start several processes with torchrun, or unset RANK and WORLD_SIZE to run one"
        return UserError(f"{problem}: {advice}")

    rank, world = variable("RANK", 0), variable("WORLD_SIZE", 1)
    found = Ranks(rank, world, variable("LOCAL_RANK", 0), variable("LOCAL_WORLD_SIZE", 1))
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise wrong("RANK is set without WORLD_SIZE")
    if not 0 <= rank < world:
        raise wrong(f"RANK={rank} is not one of WORLD_SIZE={world} processes")
    if min(found.local_rank, found.local_world - 1) < 0:
        local = f"LOCAL_RANK={found.local_rank} and LOCAL_WORLD_SIZE={found.local_world}"
        raise wrong(f"{local} conflict")
    if world > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise wrong(f"WORLD_SIZE={world} needs {name} as well")
        variable("MASTER_PORT", 0)
    return found


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """The ranks, as members of one process group; without a launcher there is none.

    A process joins its group once and leaves it when it exits, so all ranks may run several
    programs one after the other. The device of the first decides: NCCL for CUDA, else gloo.
    Joining and every collective operation take at most `DINO_TIMEOUT` minutes (30 if unset).

    Raises:
        UserError: if the launcher's environment is wrong, or another process does not answer.
    """
    current = ranks()
    if current.world == 1:
        yield current
        return
    minutes = _timeout_minutes()
    if not dist.is_initialized():
        _join(current, device, minutes)
    if dist.get_backend() == "nccl" and device.type != "cuda":
        raise UserError("this job began on GPUs and cannot continue on the CPU: use --device cuda")
    try:
        yield current
    except RuntimeError as error:  # gloo has no class of errors, but each names its source file
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            f"another process of this job ended, or did not answer within {minutes:g} minutes"
            f"{rendezvous.others()}: read its message, or set DINO_TIMEOUT to more minutes"
        ) from error


def _join(current: Ranks, device: torch.device, minutes: float) -> None:
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(
            backend,
            store=rendezvous.meet(current.rank, current.world, 60 * minutes),
            rank=current.rank,
            world_size=current.world,
            timeout=timedelta(minutes=minutes),
            device_id=device_id,
        )
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the {current.world} processes did not meet at {place} within {minutes:g} minutes "
            f"({reason}): check that all were started and that MASTER_ADDR and MASTER_PORT are "
            "right and free, or set DINO_TIMEOUT to more minutes"
        ) from error
    Finalize(None, _leave, exitpriority=0)  # unlike atexit, also in processes of multiprocessing


def _leave() -> None:
    rendezvous.leave()
    dist.destroy_process_group()


def _timeout_minutes() -> float:
    value = os.environ.get("DINO_TIMEOUT", "30")
    with suppress(ValueError):
        if 0 < float(value) <= 7 * 24 * 60:
            return float(value)
    raise UserError(f"DINO_TIMEOUT must be minutes, more than 0 and at most a week, not {value!r}")


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place."""
    if _grouped():
        dist.all_reduce(tensor)
    return tensor


def all_max(tensor: Tensor) -> Tensor:
    """The largest of each element of `tensor` over all ranks, in place."""
    if _grouped():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def all_cat(tensor: Tensor, dim: int) -> Tensor:
    """The equally large tensors of all ranks one behind the other, in rank order."""
    if not _grouped():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


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


@contextmanager
def same_errors() -> Iterator[None]:
    """End every rank with the mistake of one; the body calls no collective operation.

    Raises:
        UserError: with the sentence of the first rank whose body, or disk, fails.
    """
    error = None
    try:
        with disk_errors():
            yield
    except UserError as found:
        error = found
    messages = gather_objects("" if error is None else str(error))
    for rank, message in enumerate(messages):
        if message:
            where = f"rank {rank}: " if len({*messages}) > 1 else ""
            raise UserError(f"{where}{message}") from error


def require_same(content: dict[str, Any]) -> None:
    """Compare named values, as JSON has them, over all ranks.

    Raises:
        UserError: on every rank, with the first difference from rank 0.
    """
    first, *rest = gather_objects(content)
    for rank, other in enumerate(rest, 1):
        for name in {**first, **other}:
            here, there = first.get(name), other.get(name)
            if isinstance(here, list) and isinstance(there, list):
                pairs = (pair for pair in zip(here, there, strict=False) if pair[0] != pair[1])
                here, there = next(pairs, (here, there))
            if here != there:
                raise UserError(
                    f"rank {rank} has another {name} than rank 0 ({there!r}, not {here!r}): start "
                    "all processes with the same command, version, images and run folder"
                )


def barrier() -> None:
    """Wait until every rank has called this."""
    if _grouped():
        dist.barrier()


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Batch norm over all ranks' samples on GPUs (PyTorch's `SyncBatchNorm` has no CPU code)."""
    if _grouped() and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` whose gradients are averaged over the ranks; itself without a process group."""
    if not _grouped():
        return module
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        module, device_ids=devices, gradient_as_bucket_view=True
    )


def no_sync(module: nn.Module, skip: bool = True) -> AbstractContextManager[Any]:
    """A context in which backward passes through `module` do not average gradients over ranks."""
    if skip and isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()
