"""Registration of the programs axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ceed_vla.axes.base import Axis, SavedModule
from ceed_vla.axes.programs import decoder as decoder  # these register the decoders
from ceed_vla.axes.programs import routed as routed
from ceed_vla.axes.programs.router import ROUTER, load_router, save_router

MOST_LAYERS = 16  # a program of more layers makes too long a name


def bench_rows(config: Any, folder: Path) -> list[str]:
    """A row that skips the last layer but one, for backbones that run programs, and one for a
    checkpoint with a router.
    """
    routed = ["route0.2_conf0.2_cap2"] if (folder / ROUTER).is_file() else []
    layers = config.backbone.layers if config.backbone.type == "compact" else 0
    if not 2 < layers <= MOST_LAYERS:
        return routed
    program = "-".join(str(i) for i in range(layers) if i != layers - 2)
    return [f"program{program}_cap2", *routed]


def _detach(backbone: Any) -> None:
    backbone.router = ()


AXIS = Axis(
    "programs",
    bench_rows,
    SavedModule(
        file=ROUTER,
        load=load_router,
        save=save_router,
        modules=lambda backbone: getattr(backbone, "router", ()),
        detach=_detach,
    ),
)
