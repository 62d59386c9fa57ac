"""Mean average precision, once more: image by image along each ranking, as the protocol reads."""

from __future__ import annotations

from collections.abc import Sequence


def walked(
    ranking: Sequence[int], positives: set[int], junk: set[int], ks: Sequence[int]
) -> tuple[float, list[float]] | None:
    """Average precision and precision at each k of one query; None without positives."""
    if not positives:
        return None
    area, found, seen, last = 0.0, 0, 0, 0
    hits = []
    for image in ranking:
        if image in junk:
            continue
        hits.append(image in positives)
        if image in positives:
            before = 1.0 if seen == 0 else found / seen
            found += 1
            area += (1 / len(positives)) * (before + found / (seen + 1)) / 2
            last = seen + 1
        seen += 1
    depths = [min(k, last) for k in ks]
    return area, [sum(hits[:depth]) / depth for depth in depths]
