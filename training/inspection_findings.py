"""Faults of a dataset, which training refuses, and warnings; each with a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.broken_values import BrokenValues, broken_episodes, delete_command, remedy
from ceed_vla.data.frames import ACTION, ENVIRONMENT, STATE, FrameStore
from ceed_vla.training.inspection_values import Row, unchanging_dimensions
from ceed_vla.wording import counted, numbered

STILL = 1e-3  # share of a state's range: smaller changes between frames count as rest
IDLE = 0.5  # share of an episode's frames at rest
MOST_LISTED = 10  # episodes or pairs of instructions in one message


def without_episodes(store: FrameStore, episodes: Sequence[int]) -> FrameStore:
    """Frames of a store, not decoded, without `episodes`; the other episodes' numbers stay."""
    keep = ~np.isin(store.episode, episodes)
    episode = store.episode[keep]
    before = np.append(0, np.cumsum(keep))  # (N + 1,) frames that stay before each
    usable = store.usable
    if usable is not None:
        usable = replace(usable, frames=usable.frames[keep], end=before[usable.end[keep]])
    rows = {name: images.shape[1:] for name, images in store.images.items()}
    return replace(
        store,
        images={
            name: np.broadcast_to(np.uint8(0), (len(episode), *shape))
            for name, shape in rows.items()
        },
        state=store.state[keep],
        action=None if store.action is None else store.action[keep],
        environment_state=(
            None if store.environment_state is None else store.environment_state[keep]
        ),
        task=store.task[keep],
        episode=episode,
        episode_end=before[store.episode_end[keep]],
        usable=usable,
    )


def idle_episodes(store: FrameStore) -> list[int]:
    """Episodes in which no dimension of the state changes over more than `IDLE` of the frames."""
    if not store.state.size:
        return []
    moved = np.abs(np.diff(store.state, axis=0, append=store.state[-1:])) > STILL * np.ptp(
        store.state, axis=0
    )
    numbers, first = np.unique(store.episode, return_index=True)
    # (T,) of each episode; its last frame has no successor
    parts = np.split(moved.any(1), first[1:])
    still = [len(part) > 1 and 1.0 - part[:-1].mean() > IDLE for part in parts]
    return numbers[still].tolist()


def short_episodes(lengths: NDArray[np.int64], chunk_size: int) -> dict[int, int]:
    """Episode -> frames, for episodes shorter than one chunk; `lengths` (E,) has all episodes."""
    return {int(episode): int(lengths[episode]) for episode in np.flatnonzero(lengths < chunk_size)}


def data_faults(
    store: FrameStore, broken: Sequence[BrokenValues], arrays: Sequence[str]
) -> list[str]:
    """Why training refuses the data, with remedies.

    Args:
        store: The dataset.
        broken: Values of it that are not finite.
        arrays: See `delete_command`.
    """
    faults = []
    if broken:
        episodes = broken_episodes(broken)
        total = int(store.episode[-1]) + 1
        holds = (
            f"{counted(len(episodes), 'episode')} of {total} "
            f"{'holds' if len(episodes) == 1 else 'hold'}"
        )
        advice = remedy(store.root, episodes, total, arrays)
        faults.append(
            f"{holds} values that are not finite: {'; '.join(map(str, broken))}. {advice}"
        )
    if not store.state.shape[1]:
        faults.append(
            f"There is no {STATE}. Record the position of the robot's joints, or of its hand, "
            "under this name."
        )
    if not store.images:
        faults.append(
            "There is no camera. Record a feature of the dtype image or video with three channels."
        )
    if store.action is None and store.environment_state is None:
        faults.append(
            f"There is neither {ACTION}, as demonstrations have, nor {ENVIRONMENT}, as grounding "
            f"frames have. Record the commands of every frame as {ACTION}."
        )
    if store.action is not None and not store.shown.any():
        faults.append(
            "There is no frame to imitate: next.success is false in all "
            f"{counted(len(np.unique(store.episode)), 'episode')}. Record successes, or a person's "
            "interventions."
        )
    return faults


def idle_warning(episodes: Sequence[int]) -> list[str]:
    """A warning about episodes at rest, if there are any."""
    if not episodes:
        return []
    which = numbered("episode", episodes, MOST_LISTED)
    return [
        f"At rest in more than half of the frames: {which}. A policy learns to stand still from "
        "them; shorten the pauses, or leave these episodes out."
    ]


def short_warning(
    store: FrameStore,
    short: Mapping[int, int],
    chunk_size: int,
    removed: Sequence[int],
    arrays: Sequence[str],
) -> list[str]:
    """A warning about episodes that are shorter than a chunk.

    Args:
        store: The dataset.
        short: Episode -> frames, for the shorter ones.
        chunk_size: Steps of a chunk.
        removed: Episodes that are removed for other reasons.
        arrays: See `delete_command`.
    """
    if not short:
        return []
    listed = [f"{episode} ({counted(frames, 'frame')})" for episode, frames in short.items()]
    text = (
        f"Shorter than a chunk of {counted(chunk_size, 'step')}: "
        f"{numbered('episode', listed, MOST_LISTED)}. Their chunks are padded with the last "
        "action; padding is not learnt, except with FAST tokens, which describe whole chunks."
    )
    single = [
        episode for episode, frames in short.items() if frames == 1 and episode not in removed
    ]
    if single:
        show = "An episode of one frame shows" if len(single) == 1 else "Episodes of one frame show"
        text += f" {show} no motion; {_removal(store, single, removed, arrays)}"
    return [text]


def _removal(
    store: FrameStore, episodes: Sequence[int], removed: Sequence[int], arrays: Sequence[str]
) -> str:
    """The remedy for useless `episodes`, if `removed` are removed anyway."""
    if removed:
        return (
            f"add {numbered('episode', episodes, MOST_LISTED)} to the episode_indices of the "
            "command above."
        )
    if len(episodes) == store.episode[-1] + 1:
        return "record the dataset again."
    return (
        f"remove {'it' if len(episodes) == 1 else 'them'}: "
        f"{delete_command(store.root, episodes, arrays)}"
    )


def ignored_warning(ignored: Sequence[str]) -> list[str]:
    """A warning about observations that our policies do not use."""
    observations = [feature for feature in ignored if feature.startswith("observation.")]
    if not observations:
        return []
    return [
        f"Training ignores {', '.join(observations)}: inputs are RGB cameras, {STATE} and, as a "
        f"target, {ENVIRONMENT}. If the task needs it, write it into {STATE}."
    ]


def task_warning(pairs: Sequence[Sequence[str]]) -> list[str]:
    """A warning about instructions that differ only in their spelling."""
    if not pairs:
        return []
    shown = "; ".join(f"{first!r} and {other!r}" for first, other in pairs[:MOST_LISTED])
    more = f"; ... ({len(pairs)} pairs in all)" if len(pairs) > MOST_LISTED else ""
    return [
        f"{counted(len(pairs), 'pair')} of instructions that differ only in their spelling: "
        f"{shown}{more}. For a policy they are different tasks; make them equal "
        "(lerobot-edit-dataset, --operation.type modify_tasks with "
        "--operation.task_replacements)."
    ]


def dimension_warnings(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """A warning about every constant or near-constant dimension; `rows` by feature."""
    return [
        line
        for name, found in rows.items()
        for line in unchanging_dimensions(name, found, name == ACTION)
    ]
