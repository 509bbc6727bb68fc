"""The table and the picture of ``ceed-vla open-loop``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from ceed_vla.data.frames import ACTION, FrameStore
from ceed_vla.files import replacing
from ceed_vla.outputs import MADE_BY, default_console

MEAN_ACTION = "mean action"


def print_table(report: dict[str, Any]) -> None:
    """Print a line for every row of ``open_loop.json``."""
    chunks = sum(data["chunks"] for data in report["data"])
    table = Table(
        "decoder",
        "error [% of range]",
        "forwards mean / p95",
        "layers",
        "tokens = AR",
        "latency [ms] p50 / p95",
        "malformed",
        title=f"{chunks} chunks, {report['executed_steps']} steps of each; held-out data, no "
        "closed loop",
    )
    for name, entry in report["rows"].items():
        table.add_row(name, *_cells(entry, decoded=name != MEAN_ACTION))
    default_console().print(table)


def _cells(entry: dict[str, Any], *, decoded: bool) -> list[str]:
    """A row's cells after its name; a row that is not `decoded` has only an error."""
    error = "-" if entry["error"] is None else f"{100 * entry['error']:.2f}"
    if entry.get("error_pm95") is not None:
        error += f" ± {100 * entry['error_pm95']:.2f}"
    if not decoded:
        return [error]
    latency = entry["total_ms"]
    return [
        error,
        f"{entry['forwards_mean']:.2f} / {entry['forwards_p95']:g}",
        f"{entry['block_layers_mean']:.1f} + {entry['prefix_layers_mean']:.1f}",
        f"{100 * entry['tokens_equal_ar']:.1f} %",
        f"{latency['p50']:.1f} / {latency['p95']:.1f}",
        str(entry["malformed"]),
    ]


def draw_actions(
    store: FrameStore,
    frames: NDArray[np.int64],
    actions: dict[str, NDArray[np.float32]],
    path: Path,
) -> None:
    """Draw demonstrated and decoded actions of `frames` (F,), a panel for every dimension.

    Args:
        store: Dataset of the demonstrated actions.
        frames: Frames to draw (F,).
        actions: Decoded actions by decoder, (F or more, A).
        path: PNG file to write.
    """
    assert store.action is not None
    names = _dimension_names(store.labels.get(ACTION, []), store.action.shape[1])
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.0, 1.3 * len(names) + 0.6), layout="constrained")
        panels = np.atleast_1d(figure.subplots(len(names), 1, sharex=True))
        for dim, (panel, label) in enumerate(zip(panels, names, strict=True)):
            panel.plot(
                store.action[frames, dim],
                color="black",
                linewidth=2.0,
                alpha=0.3,
                label="demonstrated",
            )
            for name, found in actions.items():
                panel.plot(found[: len(frames), dim], linewidth=0.8, label=name)
            panel.set_ylabel(label)
        panels[0].legend(
            ncols=len(actions) + 1, loc="lower left", bbox_to_anchor=(0, 1), frameon=False
        )
        panels[-1].set_xlabel("frame")
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Software": MADE_BY})


def _dimension_names(labels: Sequence[object], count: int) -> list[str]:
    """Names of `count` dimensions: those of the dataset if it has as many, else numbers."""
    if len(labels) == count:
        return [str(label) for label in labels]
    return [f"action {i}" for i in range(count)]
