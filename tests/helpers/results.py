"""The results that evaluations leave in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def result_file(run: Path | str, evaluation: str, ending: str = ".json") -> Path:
    """RUN/results/EVALUATION-DATA.ending, of the only result of an evaluation."""
    (path,) = Path(run).glob(f"results/{evaluation}-*.json")
    return path.with_suffix(ending)


def result(run: Path | str, evaluation: str) -> dict[str, Any]:
    """The content of the only result of an evaluation."""
    content: dict[str, Any] = json.loads(result_file(run, evaluation).read_text())
    return content
