"""Registration of the programs axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ceed_vla.axes.base import Axis
from ceed_vla.axes.programs import decoder as decoder  # registers it

MOST_LAYERS = 16  # a program of more layers makes too long a name


def bench_rows(config: Any, folder: Path) -> list[str]:
    """One row that skips the last layer but one, for backbones that run programs."""
    layers = config.backbone.layers if config.backbone.type == "compact" else 0
    if not 2 < layers <= MOST_LAYERS:
        return []
    program = "-".join(str(i) for i in range(layers) if i != layers - 2)
    return [f"program{program}_cap2"]


AXIS = Axis("programs", bench_rows)
