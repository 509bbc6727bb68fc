"""The graphs behind the stems of an export, by model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ceed_vla.edge.sessions import run
from ceed_vla.edge.settings import ExportSettings
from ceed_vla.edge.slots import Cache, Slots
from ceed_vla.errors import CheckpointError, raised_as


class Graphs(Protocol):
    """Prefix and block of one family."""

    def prefill(self, words: np.ndarray, state: np.ndarray, cameras: Sequence[np.ndarray]) -> Slots:
        """Run the prefix.

        Args:
            words: (1, L) int64 ids of the instruction.
            state: (1, D) float32.
            cameras: What the stem of each camera returned.

        Returns:
            What it predicts for slot 0; its keys and values.
        """

    def read(self, cache: Cache, tokens: np.ndarray) -> Slots:
        """Compute the slots behind `tokens` (1, k) int64, which follow the positions of a cache."""


class CompactGraphs:
    """A trunk for the prefix, and a block whose tokens have learnt positions.

    Args:
        sessions: Sessions by name.
        settings: Settings of the export.
    """

    def __init__(self, sessions: Mapping[str, Any], settings: ExportSettings) -> None:
        self._trunk, self._block = sessions["trunk"], sessions["block"]

    def prefill(self, words: np.ndarray, state: np.ndarray, cameras: Sequence[np.ndarray]) -> Slots:
        features = {f"camera_{index}": tokens for index, tokens in enumerate(cameras)}
        return Slots(run(self._trunk, {"words": words, "state": state, **features}))

    def read(self, cache: Cache, tokens: np.ndarray) -> Slots:
        inputs = {
            "keys": cache.keys,
            "values": cache.values,
            "committed": np.array([cache.committed]),
            "read": np.ascontiguousarray(tokens),
        }
        return Slots(run(self._block, inputs))


class LlamaGraphs:
    """A causal language model: its layers read the embeddings of a prefix, and then of tokens.

    Args:
        sessions: Sessions by name.
        settings: Settings of the export.
    """

    def __init__(self, sessions: Mapping[str, Any], settings: ExportSettings) -> None:
        self._prefix, self._embed = sessions["prefix"], sessions["embed"]
        self._layers = sessions["layers"]
        cache = settings.cache
        self._nothing = np.zeros((cache.layers, cache.heads, 0, cache.width), np.float32)

    def prefill(self, words: np.ndarray, state: np.ndarray, cameras: Sequence[np.ndarray]) -> Slots:
        with raised_as(CheckpointError, "The exported stems do not fit together", "export again."):
            features = np.concatenate(cameras, axis=1)
        inputs = {"words": words, "state": state, "features": features}
        (embeds,) = run(self._prefix, inputs)  # (1, P, d)
        return self._run(embeds, self._nothing, self._nothing).last()

    def read(self, cache: Cache, tokens: np.ndarray) -> Slots:
        (embeds,) = run(self._embed, {"read": np.ascontiguousarray(tokens)})  # (1, k, d)
        return self._run(embeds, cache.keys, cache.values)

    def _run(self, embeds: np.ndarray, keys: np.ndarray, values: np.ndarray) -> Slots:
        return Slots(run(self._layers, {"keys": keys, "values": values, "embeds": embeds}))


FAMILIES: dict[str, type[CompactGraphs] | type[LlamaGraphs]] = {
    "compact": CompactGraphs,
    "llama": LlamaGraphs,
}
