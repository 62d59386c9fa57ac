"""What the scripts of this folder share: rows in a file of JSON lines, and a limit of time.

A row that is in the file is not computed again, so a script that was interrupted, or that stopped
at its limit, goes on where it was when it is called again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from dino.files import atomic_write

UNFINISHED = 3
"""Exit status: the time was used up; the same command continues."""


class Rows:
    """The rows of a file of JSON lines, and the time that is left.

    Args:
        path: the file; made if there is none.
        minutes: of this call.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.deadline = path, time.monotonic() + 60 * minutes
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith("\n"):  # else a killed process left it incomplete
                self.rows.append(json.loads(line))
        atomic_write(path, "".join(lines[: len(self.rows)]))

    def find(self, **key: Any) -> list[dict[str, Any]]:
        """The rows that hold all of `key`."""
        return [row for row in self.rows if key.items() <= row.items()]

    def add(self, **row: Any) -> None:
        """Append a row to the file at once."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def seconds(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()


def arguments(about: str, out: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, for a check on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing new after these")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def machine(device: torch.device) -> dict[str, str]:
    """The device and the version of PyTorch, for each row."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"machine": name, "torch": torch.__version__}
