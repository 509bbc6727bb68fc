"""The picture of ``ceed-vla inspect``: one episode in every camera, and histograms of values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ceed_vla.data.frames import ACTION, STATE, FrameStore
from ceed_vla.files import replacing
from ceed_vla.outputs import MADE_BY
from ceed_vla.training.inspection_values import rows_of

SHOWN = 4  # frames of the first episode


def draw(store: FrameStore, whole: FrameStore, path: Path) -> None:
    """Draw the first episode of `store` in every camera, and the histograms of its actions.

    Without actions, the histograms are those of the state.

    Args:
        store: The dataset, with decoded images.
        whole: Its frames with finite values; at least one.
        path: File to write.
    """
    values = whole.state if whole.action is None else whole.action
    rows = rows_of(values, store.labels.get(STATE if whole.action is None else ACTION))
    frames = np.linspace(0, store.episode_end[0] - 1, SHOWN).round().astype(np.int64)
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        height = 2.2 * len(store.images)
        figure = Figure(figsize=(9.0, height + 1.3 * -(-len(rows) // SHOWN)), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(height, 1.3 * -(-len(rows) // SHOWN)))
        above, below = parts
        panels = np.atleast_2d(above.subplots(len(store.images), SHOWN))
        for line, (name, images) in zip(panels, store.images.items(), strict=True):
            for panel, frame, image in zip(line, frames, images[frames], strict=True):
                panel.imshow(image)
                panel.set_axis_off()
                panel.set_title(f"{name.rpartition('.')[2]}, frame {frame}")
        places = below.subplots(-(-len(rows) // SHOWN), SHOWN, squeeze=False).flatten()
        for d, panel in enumerate(places):
            panel.set_visible(d < len(rows))
            if d < len(rows):
                panel.hist(values[:, d], bins=60, color="#0072B2", log=True)
                panel.set_ylim(bottom=0.5)
                panel.set_xlabel(rows[d].name)
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Software": MADE_BY})
