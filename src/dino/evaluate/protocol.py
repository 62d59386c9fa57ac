"""The interface of an evaluation that runs during training: a name, and numbers for a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from dino.models.backbone import Backbone


@runtime_checkable
class Evaluation(Protocol):
    """An evaluation that turns a network into named numbers, during training or afterwards.

    `run` may be called many times, on every rank at once, and must leave the network unchanged:
    same weights, same training flag.
    """

    @property
    def name(self) -> str:
        """The key under which the numbers appear in `metrics.jsonl`."""
        ...

    @property
    def num_queries(self) -> int:
        """The number of images that a result is a share of, which determines its noise."""
        ...

    @property
    def num_images(self) -> int:
        """The number of images that one run of it passes through the network."""
        ...

    def run(self, backbone: Backbone) -> dict[str, float]:
        """Evaluate `backbone`; the same keys at every call."""
        ...
