"""The folder of a run: its files, who may write to it, and which run it holds.

config.json        the settings, what they were applied to, and a format number
checkpoints/       `train.checkpoint`
metrics.jsonl      `train.run_log`
refused.jsonl      steps that were refused, with their images
skipped.csv        images that could not be used
teacher.safetensors, best.safetensors    the newest teacher, and the best by k-NN
sessions.json      `train.sessions`: when, where and by which command it was trained
report.html                              written at each checkpoint, complete at the end
snapshots/         attention and components at checkpoints (`show.report.snapshots`)
results.json                             written at the end of the run
results/           what `dino evaluate` measured (`evaluate.results`)
.lock              locked by the process that trains
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dino.data.sampler import spread
from dino.data.sources.open import Source
from dino.distillation.schedules import in_seconds
from dino.files import UserError, atomic_json, read_json
from dino.runtime import Ranks, gather_objects, same_errors
from dino.weights.checkpoint import last_step

FORMAT = 1
"""Of `config.json`."""
NEWER = {
    "optim.koleo": 0.0,
    "model.token_dropout": 0.0,
    "teacher.targets": "centering",
    "teacher.kind": "momentum",
    "head.predictor": False,
    "optim.loss": "cross_entropy",
    "optim.queue": 65536,
}
"""Settings that runs of earlier versions do not name, with the value that those had."""
EXAMPLES = 64
"""Images whose names `config.json` holds."""
SEEN_SECONDS = 60.0
"""In which a new file is seen on every machine."""


class RunFolder:
    """A folder that holds one run: `path`, and below it `config`, `checkpoints`, `teacher`, `best`.

    Args:
        path: of the folder; it need not exist.
        ranks: which process this is; the main rank writes, and holds the lock for all.
    """

    def __init__(self, path: str | Path, ranks: Ranks) -> None:
        self.path, self.ranks = Path(path), ranks
        self.config = self.path / "config.json"
        self.checkpoints = self.path / "checkpoints"
        self.teacher, self.best = self.path / "teacher.safetensors", self.path / "best.safetensors"

    def compare(self, defining: dict[str, Any], images: dict[str, Any]) -> None:
        """Refuse a folder that holds another run; one without a checkpoint may start anew.

        Args:
            defining: the settings that define the run.
            images: of `describe_images`.

        Raises:
            UserError: naming the settings or images that differ.
        """
        if not self.config.exists():
            return
        there = read_config(self.config)
        if last_step(self.checkpoints) is None:
            return
        before = {**NEWER, **there["defining"]}
        if before.get("model.patch_size"):  # a ViT of before there were stems
            before.setdefault("model.stem", "patch")
        found = [
            f"{name} is {before.get(name)!r} there and {defining.get(name)!r} here"
            for name in sorted({*before, *defining})
            if before.get(name) != defining.get(name)
            and not (name == "run.duration" and _longer(defining[name], before.get(name)))
        ]
        if not found and there["images"].get("digest") != images["digest"]:
            found = [_changed_images(there["images"].get("examples"), images["examples"])]
        if len(found) == 1 and found[0].startswith("run.duration "):
            raise UserError(
                f"{self.path} holds a run whose schedules end with it ({found[0]}): to train on "
                f"from its weights, give --init-from {self.path} and another --out"
            )
        if found:
            recipe = there.get("about", {}).get("recipe", "own")
            more = [f"and {len(found) - 3} more"] if len(found) > 3 else []
            raise UserError(
                f"{self.path} holds a run of the recipe {recipe} with another configuration "
                f"({'; '.join([*found[:3], *more])}): "
                "choose another --out, or the same recipe and settings to resume"
            )

    def micro_batch(self, share: int) -> int | None:
        """The images of a rank at a time, as the run chose when it began; None for a new run.

        Args:
            share: of a rank in a batch, which runs of earlier versions that took it all call null.
        """
        if not self.config.exists():
            return None
        chosen = read_config(self.config).get("micro_batch", 0)
        if chosen is None:
            return share
        return chosen if isinstance(chosen, int) and chosen > 0 else None

    def write_config(self, content: dict[str, Any]) -> None:
        """Write `config.json` (main rank)."""
        if self.ranks.main:
            atomic_json(self.config, {"format": FORMAT, **content})

    @contextmanager
    def locked(self) -> Iterator[list[str]]:
        """Keep other runs out of the folder during the body, on every rank at once.

        The folder is made if there is none. What an earlier process left half written is removed.

        Yields:
            Warnings: a sentence if the file system knows no locks.

        Raises:
            UserError: if a process that is alive holds the lock, or a rank does not see the folder
                (on every rank).
        """
        file, warning = None, ""
        try:
            with same_errors():
                if self.ranks.main:
                    file, warning = self._prepare()
            # Read by the file that holds the lock: closing another one would release it.
            owner = gather_objects(_written(file) if file is not None else "")[0]
            with same_errors():
                if not self.ranks.main:
                    self._check_seen(owner)
            yield [warning] if warning else []
        finally:
            if file is not None:
                file.close()

    def _prepare(self) -> tuple[BinaryIO, str]:
        """Make and lock the folder, and remove what an earlier process left half written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            locked = _lock(self.path / ".lock")
            for folder in (self.path, self.path / "results", self.checkpoints):
                for left in folder.glob(".*.tmp"):
                    shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        except OSError as found:
            raise UserError(
                f"{self.path} cannot be written ({found.strerror}): choose another --out"
            ) from None
        return locked

    def _check_seen(self, owner: str) -> None:
        """Wait until this rank reads the owner of the lock; network shares show it late."""
        deadline = time.monotonic() + SEEN_SECONDS
        while _owner(self.path / ".lock") != owner:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.path} is not the folder that rank 0 writes to: give all processes the "
                    "same --out, on a disk that all machines share"
                )
            time.sleep(0.1)


def read_config(path: Path) -> dict[str, Any]:
    """The content of a `config.json`.

    Raises:
        UserError: if it is none, or that of a newer version.
    """
    content = read_json(path)
    entries = content if isinstance(content, dict) else {}
    if entries.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path} has format {entries['format']}, and this version writes {FORMAT}: "
            "update dino-ssl, or choose another --out"
        )
    groups = [entries.get("defining"), entries.get("images")]
    groups += [entries.get(name, {}) for name in ("about", "execution", "init")]
    if not all(isinstance(group, dict) for group in groups):
        raise UserError(f"{path} is not the configuration of a run: choose another --out")
    return entries


def describe_images(source: Source) -> dict[str, Any]:
    """What `config.json` holds of the images: a digest, and names of some of them."""
    return {
        "digest": source.digest(),
        "examples": [source.path(index) for index in spread(len(source), EXAMPLES)],
    }


def _longer(now: str, before: Any) -> bool:
    """Whether two durations are times, of which the second is shorter: such a run may go on."""
    seconds = in_seconds(before) if isinstance(before, str) else None
    return seconds is not None and (in_seconds(now) or 0.0) >= seconds


def _changed_images(before: Any, now: list[str]) -> str:
    for old, new in zip(before if isinstance(before, list) else [], now, strict=False):
        if old != new:
            return f"the images are others: for example {old} was there, and {new} is here"
    return "the images are others: the same number, but other names, labels or files"


def _lock(path: Path) -> tuple[BinaryIO, str]:
    """The locked file, and a warning where the file system knows no locks.

    The system releases the lock when this process dies, and worker processes do not inherit it.
    """
    file = path.open("a+b", buffering=0)
    try:
        _lock_exclusively(file)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(
            f"{path.parent} is in use by another process ({_owner(path) or 'unknown'}): wait "
            "until it ends, or choose another --out"
        ) from None
    except OSError as error:
        return file, (
            f"{path.parent} cannot be locked ({error.strerror}): take care that no other process "
            "trains in it"
        )
    with suppress(OSError):  # a full disk: the lock holds without the name of its owner
        file.truncate(0)
        name = f"process {os.getpid()} on {socket.gethostname()}"
        file.write(f"{name}, {secrets.token_hex(4)}\n".encode())  # no two runs have the same
    return file, ""


def _owner(path: Path) -> str:
    """Who holds a lock, in words; "" where that cannot be read."""
    try:
        return path.read_bytes()[:200].decode(errors="replace").strip()
    except OSError:
        return ""


def _written(file: BinaryIO) -> str:
    """The owner in a locked file."""
    file.seek(0)
    return file.read(200).decode(errors="replace").strip()


def _lock_exclusively(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(2**30)  # beyond the text, which others read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
