"""`ceed-vla collect`: write a teacher's Jacobi trajectories over datasets, as parquet shards.

A trajectory holds the tokens of every state of strict Jacobi decoding, from the initial guess to
the fixed point ``Y*``. Guesses come from the mixture that inference uses. "previous" is the fixed
point of the frame ``h`` steps earlier in the same episode, shifted by ``h`` steps, so that frames
are visited in that order.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ceed_vla.checkpoints import weights_hash
from ceed_vla.data.frames import FrameStore
from ceed_vla.errors import CheckpointError, ConfigError, DatasetError
from ceed_vla.files import replacing, write_text
from ceed_vla.outputs import owned_folder
from ceed_vla.training.clipping import check_clipping
from ceed_vla.training.collect_config import CollectConfig, guess_shares
from ceed_vla.training.collector import Collector, WorkUnit, opened_inputs
from ceed_vla.training.mixture import check_fits
from ceed_vla.training.settings import full_disk, split_list
from ceed_vla.training.shards import (
    GUESSES,
    META,
    MOST_TOKENS,
    blocks,
    find_shards,
    lengths_of,
    read_meta,
    read_shard,
)
from ceed_vla.workers import open_workers

logger = logging.getLogger(__name__)

EPISODES_PER_SHARD = 64


def collect(config: CollectConfig) -> Path:
    """Collect trajectories, and return their folder.

    Complete shards survive an interrupt; ``resume`` skips them.

    Raises:
        ConfigError: The settings are invalid, or the folder belongs to another teacher, dataset or
            mixture.
    """
    if config.num_shards == 1 and "WORLD_SIZE" in os.environ:  # set by torchrun and accelerate
        rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
        if not (rank.isdecimal() and world.isdecimal()):
            raise ConfigError(
                f"RANK is {rank!r} and WORLD_SIZE {world!r}; they must be numbers or unset."
            )
        config = replace(config, shard_index=int(rank), num_shards=int(world))
    # Each process has its own shards of the folder.
    part = f"{config.shard_index}-of-{config.num_shards}" if config.num_shards > 1 else ""
    with owned_folder("output_dir", config.output_dir, part) as output:
        return _collect(config, output)


def _collect(config: CollectConfig, output: Path) -> Path:
    """Write this process's shards into `output`."""
    if config.threads:
        torch.set_num_threads(config.threads)
    inputs = opened_inputs(config)
    policy, pre, stores = inputs
    _check_inputs(config, policy, pre, stores)
    units = list(_work_units(stores, config))
    advice = "complete shards stay; continue with --resume=true"
    with full_disk(output, advice):
        meta = _write_meta(config, policy, stores, len(units), output)
    mine = units[config.shard_index :: config.num_shards]
    done = {name for _, name, _ in mine if (output / name).exists()}
    for _, name, frames in mine:
        if name in done:
            read_shard(output / name, meta, frames)  # raises unless it is complete
    missing = [unit for unit in mine if unit[1] not in done]
    malformed = 0
    there = replace(config, roots=",".join(map(os.path.abspath, split_list(config.roots))))
    with (
        tqdm(
            total=sum(len(f) for _, _, f in mine),
            desc="trajectories",
            unit="frame",
            dynamic_ncols=True,
        ) as bar,
        open_workers(
            config.workers,
            config.cluster,
            Collector,
            there,
            None,
            int,
            [store.digest for store in stores],
            checkpoints=[config.policy_path],
        ) as workers,
    ):
        # In this process, with what is open already; it also shows the frames within a unit.
        workers.here = Collector(config, inputs, bar.update)
        decoded = bar.total - sum(len(f) for _, _, f in missing)
        bar.update(decoded)
        for (_, name, frames), (table, unread) in workers.stream(missing):
            if name in done:
                continue  # it came again, because its worker was lost
            done.add(name)
            with full_disk(output, advice), replacing(output / name) as temporary:
                pq.write_table(table, temporary, compression="zstd")
            malformed += unread
            decoded += len(frames)
            bar.update(max(0, decoded - bar.n))
    if malformed:
        logger.warning("%d of the teacher's chunks are malformed; they are stored.", malformed)
    return output


def _check_inputs(
    config: CollectConfig, policy: Any, pre: Any, stores: Sequence[FrameStore]
) -> None:
    """Raise unless trajectories of this policy can be collected on these datasets."""
    check_storable(policy)
    steps = policy.config.n_action_steps
    if steps % config.frame_stride:
        raise ConfigError(
            f"frame_stride is {config.frame_stride}; it must divide n_action_steps = {steps}."
        )
    if not stores:
        raise ConfigError("No data: set --roots to one or more recorded folders.")
    for store in stores:
        check_fits(store, policy.config, pre)
    check_clipping(policy.tokenizer, stores, config.max_clipped)


def _work_units(stores: Sequence[FrameStore], config: CollectConfig) -> Iterator[WorkUnit]:
    """Groups of episodes, reduced to about `max_frames` over all stores."""
    available = sum(len(s) for s in stores) / config.frame_stride
    share = min(1.0, config.max_frames / available) if config.max_frames else 1.0
    random = np.random.default_rng(config.seed)
    for index, store in enumerate(stores):
        episodes = np.unique(store.episode)
        chosen = np.sort(random.permutation(episodes)[: max(1, round(share * len(episodes)))])
        for part in range(0, len(chosen), EPISODES_PER_SHARD):
            group = chosen[part : part + EPISODES_PER_SHARD]
            bounds = zip(
                *(np.searchsorted(store.episode, group, side) for side in ("left", "right")),
                strict=True,
            )
            frames = np.concatenate(
                [np.arange(first, end, config.frame_stride) for first, end in bounds]
            )
            yield index, f"data{index}-{part // EPISODES_PER_SHARD:05d}.parquet", frames


def check_storable(policy: Any) -> None:
    """Raise `ConfigError` unless trajectories can store a policy's tokens."""
    if policy.tokenizer.vocabulary_size > MOST_TOKENS:
        raise ConfigError(
            f"The policy's tokens have {policy.tokenizer.vocabulary_size} values; trajectories "
            "store 16 bits. Restrict the vocabulary to actions (pi0-FAST: convert with "
            "--vocabulary=actions)."
        )


def _write_meta(
    config: CollectConfig, policy: Any, stores: Sequence[FrameStore], shards: int, output: Path
) -> dict[str, Any]:
    meta = {
        "teacher": weights_hash(config.policy_path),
        "datasets": described(stores),
        **layout_of(policy),
        "states": config.states,
        "guesses": dict(zip(GUESSES, map(float, guess_shares(config.guesses)), strict=True)),
        "frame_stride": config.frame_stride,
        "max_frames": config.max_frames,
        "seed": config.seed,
        "shards": shards,
    }
    if (output / META).exists():
        found = read_meta(output)
        if are_those(stores, found["datasets"]):
            meta["datasets"] = found["datasets"]
        different = [key for key in meta if found.get(key) != meta[key]]
        if different:
            raise ConfigError(
                f"{output} holds trajectories with other {', '.join(different)}; choose another "
                "folder."
            )
        if not config.resume and config.num_shards == 1:
            raise ConfigError(
                f"{output} already holds trajectories; continue them with --resume=true."
            )
    elif unknown := find_shards(output):
        raise ConfigError(f"{output} has no {META}, but {unknown[0].name}; choose another folder.")
    write_text(output / META, json.dumps(meta, indent=2))
    return meta


def describe(stores: Sequence[FrameStore]) -> list[dict[str, Any]]:
    """Entries of ``meta.json`` about the datasets that trajectories are collected on."""
    return [{"name": s.root.name, "frames": len(s), "digest": s.digest} for s in stores]


def described(stores: Sequence[FrameStore]) -> list[dict[str, Any]]:
    """`describe`, with a hash of the instructions; earlier trajectories lack it."""
    return [{**a, "words": s.words_digest} for a, s in zip(describe(stores), stores, strict=True)]


def origin_of(stores: Sequence[FrameStore], held_out: float) -> dict[str, Any]:
    """What a run trains on, for `ceed_vla.training.run.Run.origin`."""
    tasks = [store.tasks for store in stores]
    return {"datasets": describe(stores), "tasks": tasks, "held_out": held_out}


def are_those(stores: Sequence[FrameStore], stored: list[dict[str, Any]]) -> bool:
    """Whether `stored` describes these datasets; hashes that it lacks are not compared."""
    own = described(stores)
    return len(own) == len(stored) and all(
        {**a, **b} == a for a, b in zip(own, stored, strict=True)
    )


def layout_of(policy: Any) -> dict[str, int]:
    """Layout that trajectories and the policy that uses them must have in common."""
    config = policy.config
    layout = {name: getattr(config, name) for name in ("chunk_size", "action_dim", "block_length")}
    return {
        **layout,
        "num_bins": config.action_tokens.vocabulary_size,
        "shift_steps": config.n_action_steps,
    }


# ---- reading -------------------------------------------------------------------------------------


@dataclass
class Trajectories:
    """Collected trajectories of one or more datasets."""

    root: NDArray[np.int64]  # (N,) index of the dataset
    frame: NDArray[np.int64]  # (N,) frame index in that dataset
    fixed_point: NDArray[np.int16]  # (N, n) int16, ``Y*``
    guess: NDArray[np.int16]  # (N, n) int16, ``y(0)``
    # (N, n) int16, fixed point of the frame ``h`` steps earlier (not shifted); -1 where there is
    # none
    previous: NDArray[np.int16]
    # For every row the states (k + 1, n) from guess to fixed point; empty if they were not stored
    states: list[NDArray[np.int16]]
    meta: dict[str, Any]  # contents of ``meta.json``


def read_trajectories(
    folder: str | Path, teacher: str | Path | None = None, states: bool = True
) -> Trajectories:
    """Read all complete shards in the output folder of `collect`.

    Args:
        folder: The folder.
        teacher: Checkpoint that they must be collected with; any if None.
        states: Whether the states between guess and fixed point are read.

    Raises:
        DatasetError: There are no shards, or they are not of the form that `collect` writes.
        CheckpointError: They are of another teacher.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    files = find_shards(folder)
    if not files:
        raise DatasetError(f"No trajectories at {folder}; make them with `ceed-vla collect`.")
    if teacher is not None and weights_hash(teacher) != meta["teacher"]:
        raise CheckpointError(
            f"{folder} was collected from teacher {meta['teacher']}, not from {teacher}."
        )
    if len(files) > meta["shards"]:
        raise DatasetError(f"{folder} has {len(files)} shards, its {META} says {meta['shards']}.")
    if len(files) < meta["shards"]:
        logger.warning(
            "%s has %d of %d shards; collect the others, too.", folder, len(files), meta["shards"]
        )
    table = pa.concat_tables([read_shard(file, meta) for file in files])
    root, frame = (table[name].to_numpy().astype(np.int64) for name in ("root", "frame"))
    if len(np.unique(np.stack([root, frame]), axis=1).T) < len(frame):
        raise DatasetError(f"{folder} has frames in more than one of its {len(files)} shards.")
    n = meta["block_length"]
    found = []
    if meta["states"] and states:
        found = np.split(
            pc.list_flatten(table["states"]).to_numpy(), np.cumsum(lengths_of(table["states"]))[:-1]
        )
    return Trajectories(
        root=root,
        frame=frame,
        fixed_point=blocks(table, "fixed_point", n),
        guess=blocks(table, "guess", n),
        previous=blocks(table, "previous", n),
        states=[s.reshape(-1, n) for s in found],
        meta=meta,
    )
