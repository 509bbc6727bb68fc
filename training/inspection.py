"""``ceed-vla inspect``: what a data set holds, what training would make of it, and why."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.frame_stream import StreamingConfig
from ceed_vla.data.frames import ACTION, STATE, FrameStore, open_dataset
from ceed_vla.errors import DatasetError
from ceed_vla.fields import Checked
from ceed_vla.files import replacing
from ceed_vla.outputs import MADE_BY, claim_file, default_console
from training.clipping import MOST_CLIPPED, check_actions
from training.defaults import NEAR_ZERO, SPARSE, describe, take_from_data
from training.fit_tokens import fit_action_tokens

STILL = 1e-3  # of a state's range: an arm that moves less from frame to frame stands
IDLE = 0.5  # of an episode's frames at rest
SHOWN = 4  # frames of the picture


@dataclass
class InspectConfig(Checked):
    """Settings of `ceed-vla inspect`.

    Attributes:
        root: LeRobotDataset folder.
        output: Picture of some frames and of the actions, a PNG file.
        policy: The settings that training would have, as for `ceed-vla train`.
    """

    root: str = ""
    output: str = "outputs/inspect.png"
    policy: CeedVLAConfig = field(default_factory=lambda: CeedVLAConfig(device="cpu", push_to_hub=False))


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Print and draw what the data set holds; returns it.

    A `DatasetError` says what data lack that no policy can learn from; `ConfigError` is for settings that do not fit.
    """
    picture = claim_file("output", config.output, ".png")
    if not config.root:
        raise DatasetError("--root is missing; give the folder of a LeRobotDataset.")
    store, console = open_dataset(config.root, decode=False), default_console()
    lengths = np.unique(store.episode, return_counts=True)[1]
    idle = idle_shares(store)
    report: dict[str, Any] = {
        "root": str(store.root), "frames": len(store), "episodes": len(lengths), "fps": store.fps,
        "episode_frames": [int(lengths.min()), int(np.median(lengths)), int(lengths.max())],
        "cameras": {name: list(images.shape[1:]) for name, images in store.images.items()},
        "instructions": len(store.tasks),
        "idle_episodes": np.flatnonzero(idle > IDLE).tolist(),
        "dimensions": {STATE: rows_of(store.state, store.labels.get(STATE))},
    }  # fmt: skip
    low, middle, high = report["episode_frames"]
    console.print(
        f"{store.root}: {len(lengths)} episodes, {len(store)} frames at {store.fps:g} Hz ({low} to {high} an episode, "
        f"median {middle} = {middle / store.fps:.1f} s); cameras "
        + ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in report["cameras"].items())
        + f"; {len(store.tasks)} instructions, such as {store.tasks[0]!r}"
    )
    if report["idle_episodes"]:
        shown = ", ".join(map(str, report["idle_episodes"][:10]))
        console.print(
            f"At rest in more than half of their frames: episodes {shown}; a policy learns to wait from them."
        )
    if store.action is not None:
        report["dimensions"][ACTION] = rows_of(store.action, store.labels.get(ACTION))
    for name, rows in report["dimensions"].items():
        console.print(_table(name, rows))
    report["choices"] = choices(store, config.policy) if store.action is not None else []
    for line in report["choices"] or ["No actions: these are grounding frames (--grounding_roots)."]:
        console.print(f"- {line}", soft_wrap=True, highlight=False)
    store.decode(StreamingConfig(above_gb=0.0, memory_gb=1e3))  # only the frames that are drawn
    _draw(store, picture)
    console.print(f"Written: {picture}", soft_wrap=True, highlight=False)
    return report


def idle_shares(store: FrameStore) -> NDArray[np.float64]:
    """Share (episodes,) of every episode's frames in which no dimension of the state changes."""
    moved = np.abs(np.diff(store.state, axis=0, append=store.state[-1:])) > STILL * np.ptp(store.state, axis=0)
    first = np.flatnonzero(np.diff(store.episode, prepend=-1))
    return np.array([1.0 - part[:-1].any(1).mean() if len(part) > 1 else 0.0 for part in np.split(moved, first[1:])])


def rows_of(values: NDArray[np.float32], names: list[Any] | None) -> list[dict[str, Any]]:
    """What the dimensions of `values` (N, D) hold: quantiles, the share at both ends and near zero, distinct values."""
    quantiles = np.quantile(values, [0, 0.01, 0.5, 0.99, 1], axis=0).T  # (D, 5)
    ends = (values == values.min(0)) | (values == values.max(0))
    zero = np.abs(values) <= NEAR_ZERO * np.abs(values).max(0)
    return [
        {
            "name": str(names[d]) if names and len(names) == values.shape[1] else str(d),
            **dict(zip(("min", "q01", "median", "q99", "max"), quantiles[d].tolist(), strict=True)),
            "at_ends": float(ends[:, d].mean()),
            "near_zero": float(zero[:, d].mean()),
            "distinct": len(np.unique(values[:, d])),
        }
        for d in range(values.shape[1])
    ]


def choices(store: FrameStore, settings: CeedVLAConfig) -> list[str]:
    """What training would choose, line by line, with the reasons."""
    assert store.action is not None
    policy, rows = deepcopy(settings), rows_of(store.action, store.labels.get(ACTION))
    stats = take_from_data(policy, [store], [], None)
    fit_action_tokens(policy, [store])
    policy.action_tokens.fit(policy.action_dim, stats[ACTION])
    tokens: Any = policy.action_tokens.build(policy.chunk_size, policy.action_dim)
    low, high = (end.cpu().numpy() for end in (tokens.low, tokens.high))  # (A,)
    outside = ((store.action < low) | (store.action > high)).mean(0)
    found = {
        "two values: written as one of two tokens": list(tokens.gripper_dims),
        "increments, by their names: a late chunk makes up for what is frozen": list(policy.delta_dims or []),
        f"near zero in {SPARSE:.0%} of the frames or more: the extremes are the range, not quantiles":
            [d for d, row in enumerate(rows) if row["near_zero"] >= SPARSE],
        "at an end in more than 5 % of the frames: they saturate":
            [d for d, row in enumerate(rows) if row["at_ends"] > 0.05 and row["distinct"] > 2],
        "cut to the range in more than 3 % of the frames": np.flatnonzero(outside > 0.03).tolist(),
        "never change: their tokens are always the same": [d for d, row in enumerate(rows) if row["distinct"] == 1],
    }  # fmt: skip
    lines = [f"{', '.join(rows[d]['name'] for d in dims)}: {what}." for what, dims in found.items() if dims]
    chosen = [f"Training without a simulator would take {describe(policy, tokens, store, 0)}.", *lines]
    check_actions(tokens, store.action, MOST_CLIPPED)
    return chosen


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("dimension", "min", "1 %", "median", "99 %", "max", "at an end", "near zero", "values"):
        table.add_column(column, justify="left" if column == "dimension" else "right")
    for row in rows:
        numbers = (f"{row[name]:.4g}" for name in ("min", "q01", "median", "q99", "max"))
        shares = (f"{row[name]:.1%}" for name in ("at_ends", "near_zero"))
        table.add_row(row["name"], *numbers, *shares, str(row["distinct"]))
    return table


def _draw(store: FrameStore, path: Path) -> None:
    """The first episode through every camera, and how often every value of the actions (or the state) occurs."""
    values = store.state if store.action is None else store.action
    rows = rows_of(values, store.labels.get(STATE if store.action is None else ACTION))
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
                panel.set_xlabel(rows[d]["name"])
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Software": MADE_BY})
