"""Decode frames of datasets with a teacher, and return the states as rows of trajectory shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ceed_vla.backbones.capabilities import check_whole_prefix
from ceed_vla.checkpoints import load
from ceed_vla.data.frames import FrameStore, open_dataset
from ceed_vla.decoding import DecodingConfig
from ceed_vla.errors import DatasetError
from ceed_vla.training.collect_config import CollectConfig, guess_shares
from ceed_vla.training.settings import split_list
from ceed_vla.training.shards import GUESSES, SCHEMA

# (index of the dataset, name of the shard, frames (F,))
WorkUnit = tuple[int, str, NDArray[np.int64]]


def opened_inputs(config: CollectConfig) -> tuple[Any, Any, list[FrameStore]]:
    """Load policy, preprocessor and datasets."""
    if config.device == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # one GPU per process
    policy, pre, _ = load(config.policy_path, device=config.device)
    check_whole_prefix(policy, "collect")
    stores = [open_dataset(root, streaming=config.streaming) for root in split_list(config.roots)]
    return policy, pre, stores


class Collector:
    """Decodes the frames of one work unit after another, in the order that "previous" guesses need.

    `found` is the result of `opened_inputs`; if None, in a worker (see `Workers`), it is opened
    here. `advance` is called with each number of decoded frames. `digests` are those that the
    datasets must have, if given.
    """

    stores: list[FrameStore]

    def __init__(
        self,
        config: CollectConfig,
        found: Any = None,
        advance: Callable[[int], Any] = int,
        digests: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.shares = guess_shares(config.guesses)
        self.advance = advance
        self.policy, self.pre, self.stores = found or opened_inputs(config)
        for store, digest in zip(self.stores, digests, strict=False):
            if store.digest != digest:
                raise DatasetError(
                    f"{store.root} has other frames on this machine than where the command runs; "
                    "copy the dataset again."
                )
        self.steps = self.policy.config.n_action_steps
        self.n = self.policy.config.block_length
        self.malformed = 0  # chunks of the unit that is being decoded

    def __call__(self, unit: WorkUnit) -> Iterator[tuple[pa.Table, int]]:
        """Decode a unit; yield its trajectories, and the number of its malformed chunks."""
        root, _, frames = unit
        self.malformed = 0
        store = self.stores[root]
        random = np.random.default_rng([self.config.seed, root, int(frames[0])])
        start = np.searchsorted(store.episode, store.episode[frames])
        waves = (frames - start) // self.steps
        known: dict[int, NDArray[np.int16]] = {}
        rows: list[dict[str, Any]] = []
        for wave in range(int(waves.max()) + 1):
            of_wave = frames[waves == wave]
            for part in range(0, len(of_wave), self.config.batch_size):
                chosen = of_wave[part : part + self.config.batch_size]
                rows += [
                    {"root": root, **row} for row in self._decode(store, chosen, known, random)
                ]
                self.advance(len(chosen))
        table = pa.table(
            {key: pa.array([row[key] for row in rows], kind) for key, kind in SCHEMA.items()}
        )
        yield table, self.malformed

    def _decode(
        self,
        store: FrameStore,
        frames: NDArray[np.int64],
        known: dict[int, NDArray[np.int16]],
        random: np.random.Generator,
    ) -> list[dict[str, Any]]:
        """Rows of `frames` (B,); their fixed points are added to `known`, by frame."""
        batch = self.pre(store.batch(frames, self.policy.config.chunk_size))
        previous = self._previous(store, frames, known)  # (B, n)
        kinds = random.choice(3, size=len(frames), p=self.shares)  # (B,)
        kinds[(kinds == 0) & (previous[:, 0] < 0)] = 2  # nothing to shift: a random guess instead
        # distinct states of each row, from the guess to the fixed point
        states: dict[int, NDArray[np.int16]] = {}
        method = "jacobi" if self.config.states else "ar"
        for kind in np.unique(kinds):
            chosen = np.flatnonzero(kinds == kind)
            part = {
                key: value[chosen]
                for key, value in batch.items()
                if isinstance(value, torch.Tensor)
            }
            before = torch.from_numpy(previous[chosen].astype(np.int64))
            decoding = DecodingConfig(
                method=method, guess=GUESSES[kind], seed=int(random.integers(2**31))
            )
            result = self.policy.decode(
                part, decoding, previous=before, record_states=True, read=False
            )
            self.malformed += int((~self.policy.tokenizer.readable(result.tokens)).sum())
            # (k, B, n)
            found = torch.stack([*result.states, result.tokens]).cpu().numpy().astype(np.int16)
            states |= {row: distinct_states(found[:, i]) for i, row in enumerate(chosen.tolist())}
        known |= {frame: states[i][-1] for i, frame in enumerate(frames.tolist())}
        return [
            {
                "frame": frame,
                "guess_kind": GUESSES[kinds[i]],
                "iterations": len(states[i]) - 1,
                "guess": states[i][0],
                "previous": previous[i],
                "fixed_point": states[i][-1],
                "states": states[i].reshape(-1) if self.config.states else np.empty(0, np.int16),
            }
            for i, frame in enumerate(frames.tolist())
        ]

    def _previous(
        self, store: FrameStore, frames: NDArray[np.int64], known: dict[int, NDArray[np.int16]]
    ) -> NDArray[np.int16]:
        """Fixed points (B, n) of the frames `n_action_steps` earlier; -1 before the episode."""
        previous = np.full((len(frames), self.n), -1, dtype=np.int16)
        for i, frame in enumerate(frames.tolist()):
            earlier = frame - self.steps
            if earlier in known and store.episode[earlier] == store.episode[frame]:
                previous[i] = known[earlier]
        return previous


def distinct_states(states: NDArray[np.int16]) -> NDArray[np.int16]:
    """Drop repeated states (k, n); a Jacobi trajectory repeats only its fixed point."""
    distinct = states[np.append(True, (states[1:] != states[:-1]).any(1))]
    return distinct if len(distinct) > 1 else np.concatenate([distinct, distinct])
