"""Settings and networks of the commands that measure several networks on pictures and videos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dino.evaluate.command import TRAINED, UNTRAINED, load_rgb
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.runtime import Precision
from dino.weights.load import fingerprint, untrained_like


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What these commands have in common."""

    weights: str
    """Run folder, file of weights or published name."""
    compare: tuple[str, ...] = ()
    """Further weights to be measured beside, such as those of a supervised network."""
    baseline: bool = False
    """Also measure the same network untrained."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "fp32"
    """Of the networks: fp32, or bf16 for speed."""
    out: Path | None = None
    """Where the result goes as JSON; by default beside the weights."""

    def networks(self, device: torch.device) -> dict[str, Backbone]:
        """All networks on the device: "trained", "untrained" and the others by their weights.

        Raises:
            UserError: for weights that are not there, or named twice.
        """
        named = {TRAINED: load_rgb(self.weights, device)}
        if self.baseline:
            named[UNTRAINED] = untrained_like(named[TRAINED])
        for weights in self.compare:
            if weights in named:
                raise UserError(f"--compare names {weights} twice")
            named[weights] = load_rgb(weights, device)
        return named


def identities(networks: dict[str, Backbone]) -> dict[str, Any]:
    """Which weights each network has, for a result's JSON."""
    return {
        name: {"sha256": fingerprint(network), "architecture": network.spec}
        for name, network in networks.items()
    }
