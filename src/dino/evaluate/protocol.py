"""What the training loop knows of an evaluation: a name, and numbers for a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from dino.models.backbone import Backbone


@runtime_checkable
class Evaluation(Protocol):
    """Anything that turns a network into named numbers, while it trains or afterwards.

    `run` may be called many times, on every rank at once, and must leave the network as it found
    it: same weights, same training flag.
    """

    @property
    def name(self) -> str:
        """The key under which the numbers appear in `metrics.jsonl`."""
        ...

    @property
    def asked(self) -> int:
        """How many images a number is a share of, by which its noise is told."""
        ...

    def run(self, backbone: Backbone) -> dict[str, float]:
        """Measure `backbone`; the same keys at every call."""
        ...
