"""A campaign of faults: does every run resume to the exact result, or stop with one sentence?

    python benchmarks/faults.py --tries 20
    python benchmarks/faults.py --only kill disk

A tiny network is trained for some steps, once without a fault, and again and again with one. After
it the same call is repeated until the run ends, and its checkpoint, `teacher.safetensors` and
`metrics.jsonl` are compared with those of the run without a fault. Linux only.

Kinds:
    kill        SIGKILL of the main process before or after an operation on a file
    write       the process dies in the middle of a write, at any byte
    disk        ENOSPC, EIO, EROFS, EACCES of an operation on a file
    vanish      the file of an operation is removed before it
    signal      SIGTERM, SIGINT once and twice, SIGSTOP with SIGCONT, at an operation on a file
    worker      SIGKILL of a process that reads images
    damage      a file of the run folder is cut, emptied, zeroed, removed, or one bit is flipped
    text        other text in a JSON file of the run folder, or in LAST
    two         a second process trains in the folder at the same time
    nan         batches that are not finite
    clock       the clock of the system jumps by days, forward and back
    rank        SIGKILL of one of two ranks
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch._dynamo  # otherwise every process would import it again
from helpers.small import TINY_RUN, images
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from dino.files import UserError, disk_errors
from dino.rendezvous import report_failure
from dino.train import checkpoint, loop
from dino.train.loop import train
from dino.train.planning.estimate import Estimate
from dino.train.recipes import demo
from dino.train.run_log import read_metrics
from dino.weights import load as weights

LIMIT = 300.0
"""Seconds after which a run counts as hanging; its log then ends with where it stood."""
SETTINGS = {
    **TINY_RUN,
    "model.depth": 1,
    "run.duration": "4 steps",
    "execution.log_every": "1 steps",
    "execution.checkpoint_every": "1 steps",
    "execution.knn_every": "0 steps",
    "execution.max_refused": 3,
}
ESTIMATE = Estimate(None, 0.1, 0.01, 0, None)
"""Nothing is timed before the first step: that takes longer than the steps."""
WRITING = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")
RANDOM = random.Random(0)


def run(folder: Path, **changes: Any) -> None:
    """One call of the program."""
    config = demo().changed({**SETTINGS, **changes})
    result = train(config, images(), folder, device=torch.device("cpu"))
    if not result.finished:
        sys.exit(130)


# ----------------------------------------------------------------------------------- processes
class Child:
    """A forked process that calls `run` after `prepare`; its output goes to a file."""

    def __init__(
        self,
        folder: Path,
        prepare: Callable[[], object] = lambda: None,
        log: str = ".log",
        **changes: Any,
    ):
        self.log = folder.with_suffix(log)
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            self._work(folder, prepare, changes)

    def _work(self, folder: Path, prepare: Callable[[], object], changes: dict[str, Any]) -> None:
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 0
        faulthandler.dump_traceback_later(LIMIT * 0.9, exit=False)
        loop.estimate = lambda *_, **__: ESTIMATE
        try:
            with disk_errors():
                prepare()
                run(folder, **changes)
        except UserError as error:
            os.write(2, f"dino: {error}\n".encode())
            report_failure(str(error))
            status = 2
        except KeyboardInterrupt:
            status = 130
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            status = 1
        os._exit(status)

    def outcome(self) -> str:
        """How it ended: ok, killed, stopped, sentence, traceback or hang."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return self._outcome(os.waitstatus_to_exitcode(status))
            time.sleep(0.01)
        self.kill()
        os.waitpid(self.pid, 0)
        return "hang"

    def kill(self) -> None:
        """End it and its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _outcome(self, status: int) -> str:
        if "Traceback" in (text := self.log.read_text(errors="replace")):
            return "traceback"
        sentences = [line for line in text.splitlines() if line.startswith("dino: ")]
        if status == 2:
            return "sentence" if sentences else "traceback"
        return {0: "ok", 130: "stopped", 1: "traceback"}.get(status, "killed")


# ----------------------------------------------------------------------------------- faults inside
class Operations:
    """Counts the operations on files below a folder, and acts at one of them.

    Python announces most of them to audit hooks; fsync, and the writes of safetensors, are wrapped.
    """

    def __init__(self, folder: Path, at: int = -1, act: Callable[[str], object] = print):
        self.folder, self.at, self.act, self.count = str(folder), at, act, 0
        self._inside = False

    def install(self) -> None:
        sys.addaudithook(self._hear)
        sync, save = os.fsync, checkpoint.save_file

        def fsync(descriptor: int) -> None:
            self._meet(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            sync(descriptor)
            self._meet(self.folder)

        def save_file(tensors: Any, path: Any, *rest: Any, **options: Any) -> None:
            self._meet(str(path))
            save(tensors, path, *rest, **options)
            self._meet(str(path))

        os.fsync = fsync
        checkpoint.save_file = weights.save_file = save_file

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITING and isinstance(arguments[0], (str, os.PathLike)):
            self._meet(os.fspath(arguments[0]))

    def _meet(self, path: str) -> None:
        if self._inside or not path.startswith(self.folder):
            return
        self.count += 1
        if self.count - 1 == self.at:
            self._inside = True
            self.act(path)
            self._inside = False


def number_of_operations(root: Path) -> int:
    """How many operations on files a run has, by a run that writes the number to a file."""
    counted = root / "operations"

    def prepare() -> None:
        operations = Operations(root / "count")
        operations.install()
        end = os._exit
        os._exit = lambda status: (counted.write_text(str(operations.count)), end(status))  # type: ignore[assignment]

    assert Child(root / "count", prepare).outcome() == "ok"
    return int(counted.read_text())


def fail(number: int) -> Callable[[str], None]:
    def act(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return act


def vanish(path: str) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def stop_for_a_moment(_: str) -> None:
    if os.fork() == 0:
        time.sleep(0.2)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


def send(*numbers: int) -> Callable[[str], None]:
    return lambda _: [os.kill(os.getpid(), number) for number in numbers]  # type: ignore[return-value]


Fault = tuple[str, Callable[[Path], str]]
"""What happens, and a function that lets it happen to a run and returns how that ended."""


def at_operations(
    root: Path, tries: int, acts: dict[str, Callable[[str], object]], every: bool = False
) -> Iterator[Fault]:
    total = number_of_operations(root)
    places = range(total) if every else sorted(RANDOM.sample(range(total), min(total, tries)))
    for place in places:
        name = RANDOM.choice(list(acts))

        def happen(folder: Path, place: int = place, name: str = name) -> str:
            return Child(folder, Operations(folder, place, acts[name]).install).outcome()

        yield f"{name} at {place}", happen


def kill(root: Path, tries: int) -> Iterator[Fault]:
    return at_operations(root, tries, {"SIGKILL": send(signal.SIGKILL)})


def write(root: Path, tries: int) -> Iterator[Fault]:
    for _ in range(tries):
        size = int(2 ** RANDOM.uniform(3, 18))

        def limit(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        yield f"death at byte {size}", lambda folder, limit=limit: Child(folder, limit).outcome()


def disk(root: Path, tries: int) -> Iterator[Fault]:
    names = ("ENOSPC", "EIO", "EROFS", "EACCES")
    return at_operations(root, tries, {name: fail(getattr(errno, name)) for name in names})


def vanishing(root: Path, tries: int) -> Iterator[Fault]:
    return at_operations(root, tries, {"vanish": vanish})


def signals(root: Path, tries: int) -> Iterator[Fault]:
    acts: dict[str, Callable[[str], object]] = {
        "SIGTERM": send(signal.SIGTERM),
        "SIGINT": send(signal.SIGINT),
        "SIGINT twice": send(signal.SIGINT, signal.SIGINT),
        "SIGSTOP": stop_for_a_moment,
    }
    return at_operations(root, tries, acts)


def worker(root: Path, tries: int) -> Iterator[Fault]:
    for _ in range(tries):
        step = RANDOM.randrange(4)

        def prepare(step: int = step) -> None:
            views = loop._Loop._views

            def patched(self: Any, batch: Any) -> Any:
                if batch.step == step:
                    import multiprocessing

                    for child in multiprocessing.active_children():
                        os.kill(child.pid or 0, signal.SIGKILL)
                return views(self, batch)

            loop._Loop._views = patched  # type: ignore[method-assign]

        def happen(folder: Path, prepare: Callable[[], None] = prepare) -> str:
            options: dict[str, Any] = {"execution.workers": 1}
            return Child(folder, prepare, **options).outcome()

        yield f"worker at step {step}", happen


# ----------------------------------------------------------------------------------- damaged files
def files_of(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(str(path.relative_to(folder)) for path in found)


def interrupted(folder: Path) -> str:
    """A run that has stopped after three of its four steps."""

    def prepare() -> None:
        views = loop._Loop._views

        def patched(self: Any, batch: Any) -> Any:
            if batch.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return views(self, batch)

        loop._Loop._views = patched  # type: ignore[method-assign]

    return Child(folder, prepare).outcome()


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    place = RANDOM.randrange(max(1, len(data)))
    if how == "removed":
        path.unlink()
        return
    changed = {
        "cut": data[:place],
        "emptied": b"",
        "zeroed": data[:place] + bytes(len(data[place:])),
        "flipped": data[:place]
        + bytes([data[place] ^ 1 << RANDOM.randrange(8)])
        + data[place + 1 :],
    }
    path.write_bytes(changed[how])


TEXTS = (b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe", b"{", b"[" * 100_000, b"\0" * 20)


def after_interruption(root: Path, tries: int, change: Callable[[Path], str]) -> Iterator[Fault]:
    def happen(folder: Path) -> str:
        assert interrupted(folder) == "stopped"
        change(folder)
        return Child(folder).outcome()

    for _ in range(tries):
        yield "damage", happen


def damage(root: Path, tries: int) -> Iterator[Fault]:
    def change(folder: Path) -> str:
        name = RANDOM.choice(files_of(folder))
        spoil(folder / name, RANDOM.choice(["cut", "emptied", "zeroed", "flipped", "removed"]))
        return name

    return after_interruption(root, tries, change)


def text(root: Path, tries: int) -> Iterator[Fault]:
    def change(folder: Path) -> str:
        names = [n for n in files_of(folder) if not n.endswith(".safetensors")]
        (folder / (name := RANDOM.choice(names))).write_bytes(RANDOM.choice(TEXTS))
        return name

    return after_interruption(root, tries, change)


# ----------------------------------------------------------------------------------- other faults
def two(root: Path, tries: int) -> Iterator[Fault]:
    def happen(folder: Path) -> str:
        children = [Child(folder, log=log) for log in (".log", ".log2")]
        return " and ".join(child.outcome() for child in children)

    for _ in range(tries):
        yield "two processes", happen


def nan(root: Path, tries: int) -> Iterator[Fault]:
    def prepare() -> None:
        views = loop._Loop._views

        def patched(self: Any, batch: Any) -> Any:
            groups = views(self, batch)
            if batch.step >= 1:
                groups[0][0, 0] = float("nan")
            return groups

        loop._Loop._views = patched  # type: ignore[method-assign]

    for _ in range(tries):
        yield "nan", lambda folder: Child(folder, prepare).outcome()


def clock(root: Path, tries: int) -> Iterator[Fault]:
    def prepare() -> None:
        real = time.time
        time.time = lambda: real() + RANDOM.choice([-1, 1]) * 86_400 * RANDOM.random() * 30

    for _ in range(tries):
        yield "clock", lambda folder: Child(folder, prepare).outcome()


def two_ranks(folder: Path, victim: int = -1, step: int = -1) -> str:
    """A run of two ranks, of which one is killed before a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def prepare(number: int) -> None:
        launched = {"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": number, "DINO_TIMEOUT": 1}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in launched.items()}
        views = loop._Loop._views

        def patched(self: Any, batch: Any) -> Any:
            if batch.step == step and number == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            return views(self, batch)

        loop._Loop._views = patched  # type: ignore[method-assign]

    children = [
        Child(folder, lambda number=number: prepare(number), f".log{number or ''}")
        for number in range(2)
    ]
    found = {child.outcome() for child in children}
    return found.pop() if len(found) == 1 else " and ".join(sorted(found))


def rank(root: Path, tries: int) -> Iterator[Fault]:
    for _ in range(tries):
        options = {"victim": RANDOM.randrange(2), "step": RANDOM.randrange(4)}
        yield f"rank {options}", lambda folder, options=options: two_ranks(folder, **options)


KINDS: dict[str, Callable[[Path, int], Iterator[Fault]]] = {
    "kill": kill,
    "write": write,
    "disk": disk,
    "vanish": vanishing,
    "signal": signals,
    "worker": worker,
    "damage": damage,
    "text": text,
    "two": two,
    "nan": nan,
    "clock": clock,
    "rank": rank,
}


# ----------------------------------------------------------------------------------- the verdict
def content(folder: Path) -> dict[str, Any]:
    """What a run ends with."""
    last = (folder / "checkpoints" / "LAST").read_text().strip()
    files = {path.name: path for path in (folder / "checkpoints" / last).glob("*.safetensors")}
    files["newest teacher"] = folder / "teacher.safetensors"
    found: dict[str, Any] = {"steps": [line["step"] for line in read_metrics(folder)]}
    for name, path in files.items():
        found |= {f"{name} {key}": tensor for key, tensor in load_file(path).items()}
    return {"last": last, **found}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
        for key, value in ours.items()
    )


def unreadable(folder: Path) -> bool:
    """Whether LAST names a checkpoint that cannot be read."""
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    try:
        last = checkpoints.last()
        return last is not None and checkpoints.newest() != (last, [])
    except UserError:
        return True


def verdict(kind: str, folder: Path, expected: dict[str, Any], how: str) -> str:
    """What became of a run after its fault."""
    if "hang" in how or "traceback" in how:
        return how
    if kind not in ("damage", "text") and unreadable(folder):
        return "LAST unreadable"
    for _ in range(3):
        if (how := again(kind, folder)) != "stopped":
            break
    if how == "ok":
        found = content(folder)
        if kind in ("damage", "text"):  # lines of metrics that were spoiled do not come again
            found["steps"] = expected["steps"]
        how = "exact" if same(found, expected) else "other result"
    if list(folder.rglob("*.tmp")):
        how += ", files left"
    return how


def again(kind: str, folder: Path) -> str:
    return two_ranks(folder) if kind == "rank" else Child(folder).outcome()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=20, help="faults of each kind, at most")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    RANDOM.seed(args.seed)
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for kind in args.only:
            counts[kind], straight = Counter(), root / f"{kind} straight"
            assert again(kind, straight) == "ok", straight.with_suffix(".log").read_text()
            expected = content(straight)
            for number, (name, happen) in enumerate(KINDS[kind](root, args.tries)):
                folder = root / f"{kind}{number}"
                how = happen(folder)
                found = verdict(kind, folder, expected, how)
                counts[kind][found] += 1
                if found not in ("exact", "sentence"):
                    log = folder.with_suffix(".log").read_text(errors="replace")
                    print(f"{kind} {name}: {how}, then {found}\n{log[-600:]}", flush=True)
                shutil.rmtree(folder, ignore_errors=True)
            print(kind, dict(counts[kind]), flush=True)
    outcomes = list(dict.fromkeys(["exact", "sentence", *(o for c in counts.values() for o in c)]))
    table = Table("fault", "runs", *outcomes)
    for kind, count in counts.items():
        table.add_row(kind, str(count.total()), *(str(count[outcome]) for outcome in outcomes))
    Console().print(table)
    good = all({*count} <= {"exact", "sentence"} for count in counts.values())
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
