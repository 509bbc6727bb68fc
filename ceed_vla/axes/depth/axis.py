"""Registration of the depth axis."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from ceed_vla.axes.base import Axis, SavedModule
from ceed_vla.axes.depth import decoders as decoders  # registers them
from ceed_vla.axes.depth.exits import EXITS, load_exits, save_exits
from ceed_vla.axes.exit_file import described_exits


def bench_rows(config: Any, folder: Path) -> list[str]:
    """Rows for a policy with early-exit layers: Balcony and ASE, DSSD, DeeR-VLA."""
    kind, depths = described_exits(folder)
    rows = [f"depth{depth}_cap2_fresh" for depth in depths]
    if kind == "linear":
        rows += [f"sure{depth}p0.2_conf0.2_cap2" for depth in depths[1:]]
    if kind in ("linear", "coarse"):
        neighbours = [upper for lower, upper in pairwise(depths) if upper == lower + 1]
        rows += [f"deer{upper}t3_conf0.2_cap2" for upper in neighbours]
    return rows


def _detach(backbone: Any) -> None:
    backbone.exits = {}


AXIS = Axis(
    "depth",
    bench_rows,
    SavedModule(
        file=EXITS,
        load=load_exits,
        save=save_exits,
        modules=lambda backbone: getattr(backbone, "exits", {}).values(),
        detach=_detach,
    ),
)
