"""Runs and pages of `dino report` for tests."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

VIT = {
    "arch": "vit_tiny",
    "embed_dim": 12,
    "depth": 1,
    "heads": 2,
    "patch_size": 4,
    "image_size": 8,
}
KNN = {"trained": 70.6, "untrained": 58.6, "pixels": 37.0, "k": 20, "bank": 1728, "queries": 576}

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects addresses and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)  # <line .../>: closed at once

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def metrics(steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(10, 10 * steps + 1, 10):
        lines.append(
            {
                "step": step,
                "epoch": step / 20,
                "loss": 4.0 - step / 100,
                "teacher_entropy": 3.0,
                "kl": 1.0 - step / 100,
                "feature_std": 0.7,
                "effective_rank": 12.0,
                "images_per_s": 250.0,
                "data_wait": 0.25,
                "lr": 1e-3,
                "refused": 0,
            }
        )
    lines.append({"step": 10 * steps, "knn": {"k10": 61.0, "k20": 62.5}})
    return lines
