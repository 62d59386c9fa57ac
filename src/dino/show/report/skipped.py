"""The images that a run could not use, as a list on its page."""

from __future__ import annotations

import csv

from dino.data.images.image_errors import count_defects, read_list
from dino.files import UserError
from dino.show.html import table
from dino.show.report.run_contents import Run

LISTED = 100
"""Images on the page; `skipped.csv` has all."""


def skipped_section(run: Run) -> str:
    """Which images were skipped, and why; empty where none were.

    Raises:
        UserError: if the list is damaged.
    """
    path = run.folder / "skipped.csv"
    if not path.exists():
        return ""
    try:
        found = read_list(path)
        rows = [[name, defect, reason] for name, (defect, reason) in found.items()]
        counts = count_defects(defect for _, defect, _ in rows)
    except (KeyError, TypeError, csv.Error, OSError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if not rows:
        return ""
    more = "" if len(rows) <= LISTED else f", the first {LISTED} of them"
    shown = table(rows[:LISTED], ["image", "defect", "reason"], css="facts")
    summary = f"<summary>{counts}{more}; all in skipped.csv</summary>"
    return f"<h2>Images that could not be used</h2><details>{summary}{shown}</details>"
