"""``ceed-vla inspect``: content and faults of a dataset, settings that training derives from it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ceed_vla.configuration_ceed_vla import CeedVLAConfig
from ceed_vla.data.broken_values import EDIT, broken_episodes, find_broken
from ceed_vla.data.files import read_info
from ceed_vla.data.frame_stream import StreamingConfig
from ceed_vla.data.frames import ACTION, ENVIRONMENT, STATE, FrameStore, open_dataset
from ceed_vla.errors import CeedVLAError, DatasetError
from ceed_vla.fields import Checked, ranged
from ceed_vla.outputs import claim_file, default_console
from ceed_vla.training.clipping import MOST_CLIPPED, check_actions
from ceed_vla.training.defaults import SPARSE, describe, take_from_data
from ceed_vla.training.fit_tokens import fit_action_tokens
from ceed_vla.training.inspection_findings import (
    data_faults,
    dimension_warnings,
    idle_episodes,
    idle_warning,
    ignored_warning,
    short_episodes,
    short_warning,
    task_warning,
    without_episodes,
)
from ceed_vla.training.inspection_picture import draw
from ceed_vla.training.inspection_tasks import similar_tasks
from ceed_vla.training.inspection_values import Row, as_dicts, rows_of
from ceed_vla.wording import counted, numbered


@dataclass
class InspectConfig(Checked):
    """Settings of `ceed-vla inspect`.

    Attributes:
        root: LeRobotDataset folder.
        output: PNG file for a picture of some frames and of the actions.
        minutes: Budget of a training, for an estimate of the steps that fit into it on this machine
            [min]; 0 for no estimate.
        policy: Settings of the policy, as for `ceed-vla train`.
    """

    root: str = ""
    output: str = "outputs/inspect.png"
    minutes: float = ranged(20.0, "[0, 1e6]")
    policy: CeedVLAConfig = field(
        default_factory=lambda: CeedVLAConfig(device="cpu", push_to_hub=False)
    )


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Print and draw the content of a dataset, with a verdict.

    Returns:
        The report.

    Raises:
        DatasetError: The folder holds no readable dataset; or, after the report was printed,
            training would refuse the data.
        ConfigError: `output` cannot be written.
    """
    report = survey(config)
    if report["faults"]:
        found = counted(len(report["faults"]), "fault")
        raise DatasetError(
            f"{report['root']} cannot be trained on: {found}; the verdict lists the remedies."
        )
    return report


def survey(config: InspectConfig) -> dict[str, Any]:
    """As `inspect`, but faults of the data are returned as "faults" instead of raised."""
    picture = claim_file("output", config.output, ".png")
    if not config.root:
        raise DatasetError("--roots is missing; it must be the folder of a LeRobotDataset.")
    console = default_console()
    store = open_dataset(config.root, decode=False, strict=False)
    arrays = read_info(store.root).arrays
    found = {STATE: store.state, ACTION: store.action, ENVIRONMENT: store.environment_state}
    vectors = {name: values for name, values in found.items() if values is not None}
    broken = find_broken(vectors, store.episode)
    removed = broken_episodes(broken)
    whole = without_episodes(store, removed)  # statistics are those of the other episodes
    rows = {STATE: rows_of(whole.state, store.labels.get(STATE))}
    if whole.action is not None:
        rows[ACTION] = rows_of(whole.action, store.labels.get(ACTION))

    report = _contents(store, whole, config.policy.chunk_size)
    report["broken"] = [
        {"feature": b.feature, "kind": b.kind, "episodes": b.episodes} for b in broken
    ]
    report["dimensions"] = {name: as_dicts(dimensions) for name, dimensions in rows.items()}
    report["faults"] = data_faults(store, broken, arrays)
    report["warnings"] = [
        *short_warning(store, report["short_episodes"], config.policy.chunk_size, removed, arrays),
        *idle_warning(report["idle_episodes"]),
        *ignored_warning(store.ignored),
        *task_warning(report["similar_tasks"]),
        *dimension_warnings(rows),
    ]
    _print_contents(console, report, store)
    without = f" (without {numbered('episode', removed)})" if removed else ""
    for name, dimensions in rows.items():
        if dimensions:
            console.print(_table(name + without, dimensions))
    _add_training(report, whole, config)
    for line in report["choices"]:
        _say(console, f"- {line}")
    if report["budget"]:
        _say(console, f"- {report['budget']}")
    if store.images and len(whole):
        store.decode(StreamingConfig(above_gb=0.0, memory_gb=1e3))  # only the frames that are drawn
        draw(store, whole, picture)
        _say(console, f"Written: {picture}")
    for line in verdict(report["faults"], report["warnings"]):
        _say(console, line)
    return report


def _contents(store: FrameStore, whole: FrameStore, chunk_size: int) -> dict[str, Any]:
    """Summary of the dataset; `whole` has its frames with finite values."""
    lengths = np.bincount(store.episode)  # (E,)
    return {
        "root": str(store.root),
        "frames": len(store),
        "episodes": len(lengths),
        "fps": store.fps,
        "episode_frames": [int(lengths.min()), int(np.median(lengths)), int(lengths.max())],
        "cameras": {name: list(images.shape[1:]) for name, images in store.images.items()},
        "instructions": len(store.tasks),
        "ignored": list(store.ignored),
        "idle_episodes": idle_episodes(whole),
        "short_episodes": short_episodes(lengths, chunk_size),
        "similar_tasks": [list(pair) for pair in similar_tasks(store.tasks)],
    }


def _print_contents(console: Console, report: dict[str, Any], store: FrameStore) -> None:
    low, middle, high = report["episode_frames"]
    cameras = ", ".join(
        f"{name} {'x'.join(map(str, shape))}" for name, shape in report["cameras"].items()
    )
    such = "such as " if len(store.tasks) > 1 else ""
    _say(
        console,
        f"{store.root}: {counted(report['episodes'], 'episode')}, {counted(len(store), 'frame')} "
        f"at {store.fps:g} Hz ({low} to {high} an episode, median {middle} = "
        f"{middle / store.fps:.1f} "
        f"s); {'cameras' if len(store.images) > 1 else 'camera'} {cameras or 'none'}; "
        f"{counted(len(store.tasks), 'instruction')}, {such}{store.tasks[0]!r}",
    )
    if str(store.usable or ""):
        _say(console, f"{store.usable}.")
    if store.ignored:
        _say(console, f"Ignored by training: {', '.join(store.ignored)}")


def _add_training(report: dict[str, Any], whole: FrameStore, config: InspectConfig) -> None:
    """Add the settings that training would derive, and the steps that fit into the budget.

    Errors of training are added to the faults.
    """
    report["choices"], report["budget"] = [], None
    if whole.action is None:
        report["choices"] = ["No actions: these are grounding frames (--grounding_roots)."]
    if whole.action is None or not (len(whole) and whole.images and whole.state.shape[1]):
        return
    policy = deepcopy(config.policy)
    try:
        tokens = fit_policy(policy, whole)
        report["choices"] = choices(whole, policy, tokens)
        if not tokens.normalised:  # a normalised range is not in the units of the data
            check_actions(tokens, whole.action, MOST_CLIPPED)
    except CeedVLAError as error:
        report["faults"].append(str(error))
    if config.minutes and report["choices"] and whole.shown.any():
        from ceed_vla.training.estimate import estimate

        try:
            budget = estimate([whole], config.policy, config.minutes)
        except CeedVLAError as error:
            report["faults"] += [] if str(error) in report["faults"] else [str(error)]
            return
        report["budget"] = f"{budget}. {budget.expectation if budget.enough else ''}".rstrip()
        if not budget.enough:
            report["warnings"].append(
                f"Time or data are scarce for {config.minutes:g} minutes: {budget.advice}."
            )


def fit_policy(policy: CeedVLAConfig, store: FrameStore) -> Any:
    """Fill in a new policy's settings as training would, and return its action tokens."""
    stats = take_from_data(policy, [store], [], None)
    fit_action_tokens(policy, [store])
    policy.action_tokens.fit(policy.action_dim, stats[ACTION])
    return policy.action_tokens.build(policy.chunk_size, policy.action_dim)


def choices(store: FrameStore, policy: CeedVLAConfig, tokens: Any) -> list[str]:
    """Lines about the settings that training would derive, with reasons; see `fit_policy`."""
    assert store.action is not None
    rows = rows_of(store.action, store.labels.get(ACTION))
    low, high = (end.cpu().numpy() for end in (tokens.low, tokens.high))  # (A,)
    outside = ((store.action < low) | (store.action > high)).mean(0)
    found = {
        "two values: written as one of two tokens": list(tokens.gripper_dims),
        "increments, by their names: a late chunk compensates the frozen steps": list(
            policy.delta_dims or []
        ),
        f"near zero in {SPARSE:.0%} of the frames or more: the extremes are the range, "
        "not quantiles": [d for d, row in enumerate(rows) if row.near_zero >= SPARSE],
        "at an end in more than 5 % of the frames: they saturate": [
            d for d, row in enumerate(rows) if row.at_ends > 0.05 and row.distinct > 2
        ],
        "clipped to the range in more than 3 % of the frames": np.flatnonzero(
            outside > 0.03
        ).tolist(),
        "never change: their tokens are always the same": [
            d for d, row in enumerate(rows) if row.distinct == 1
        ],
    }
    lines = [
        f"{', '.join(rows[d].name for d in dims)}: {what}." for what, dims in found.items() if dims
    ]
    return [
        f"Training without a simulator would take {describe(policy, tokens, store, 0)}.",
        *lines,
    ]


def verdict(faults: Sequence[str], warnings: Sequence[str]) -> list[str]:
    """Last lines of the report; a command at the end of a fault or warning gets its own line."""
    count = counted(len(warnings), "warning")
    listed = [f"  - {_apart(warning)}" for warning in warnings]
    if faults:
        lines = [f"  {number}. {_apart(fault)}" for number, fault in enumerate(faults, 1)]
        also = [f"Also {count}:"] if warnings else []
        return [
            f"Verdict: cannot be trained on: {counted(len(faults), 'fault')}",
            *lines,
            *also,
            *listed,
        ]
    if warnings:
        return [f"Verdict: ready, with {count}", *listed]
    return ["Verdict: ready for training."]


def _apart(text: str) -> str:
    return text.replace(f": {EDIT} ", f":\n     {EDIT} ")


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in (
        "dimension",
        "min",
        "1 %",
        "median",
        "99 %",
        "max",
        "at an end",
        "near zero",
        "values",
    ):
        table.add_column(column, justify="left" if column == "dimension" else "right")
    for row in rows:
        numbers = (f"{number:.4g}" for number in (row.min, row.q01, row.median, row.q99, row.max))
        table.add_row(
            row.name, *numbers, f"{row.at_ends:.1%}", f"{row.near_zero:.1%}", str(row.distinct)
        )
    return table


def _say(console: Console, line: str) -> None:
    """Print a line without line breaks, so that a command in it can be copied."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)
