"""Registration of the context axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ceed_vla.axes.base import Axis, SavedModule
from ceed_vla.axes.context import decoder as decoder  # registers it
from ceed_vla.axes.context.scorer import CONTEXT, load_context, save_context


def bench_rows(config: Any, folder: Path) -> list[str]:
    """One row for a policy with a scorer of prefix tokens."""
    return ["keep24_conf0.2_cap2"] if (folder / CONTEXT).is_file() else []


def _detach(backbone: Any) -> None:
    backbone.context = ()


AXIS = Axis(
    "context",
    bench_rows,
    SavedModule(
        file=CONTEXT,
        load=load_context,
        save=save_context,
        modules=lambda backbone: getattr(backbone, "context", ()),
        detach=_detach,
    ),
)
