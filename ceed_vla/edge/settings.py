"""The settings of an export: one JSON file beside its graphs.

They hold everything but the weights: features, normalization, words, the action vocabulary, the
decoding, sizes of the cache, and the hash of every graph. `ceed_vla.export` writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.fields import Checked, chosen, ranged, short
from ceed_vla.files import read_bytes, read_json
from ceed_vla.word_ids import WordIds

SETTINGS = "export.json"
FORMAT = 1
FAMILIES = ("compact",)
EXPORTED = ("ar", "jacobi")  # decoders that run on an export
MOST_GRAPH = 2_000_000_000  # [bytes]
MOST_TOKENS = 65_536  # of a block
MOST_VALUES = 2**30  # of keys, and of the table of actions


@dataclass
class StateSettings(Checked, prefix="state."):
    """The state vector and its normalization, ``(state - mean) / (std + eps)``.

    Attributes:
        name: Feature of an observation.
        mean: Per dimension; with `std` empty, the state is not normalized.
        std: Per dimension.
        size: Dimensions.
    """

    name: str
    size: int = ranged(1, "[1, 65536]")
    mean: list[float] = ranged([], "[-1e9, 1e9]")
    std: list[float] = ranged([], "[0, 1e9]")
    eps: float = ranged(1e-8, "[0, 1e-3]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, self.size):
            raise ConfigError(
                f"state.mean has {len(self.mean)} values and state.std {len(self.std)}; it must be "
                f"none or {self.size} each."
            )
        if any(np.float32(std) + np.float32(self.eps) == 0 for std in self.std):
            raise ConfigError(
                f"state.std has 0 and state.eps is {self.eps}; their sum divides the state, so it "
                "must be positive."
            )


@dataclass
class CacheSettings(Checked, prefix="cache."):
    """Sizes of the keys and values.

    Attributes:
        layers: Layers.
        heads: Heads of keys and values.
        width: Width of a head.
        prefix: Positions of the prefix.
    """

    layers: int = ranged(1, "[1, 1024]")
    heads: int = ranged(1, "[1, 1024]")
    width: int = ranged(1, "[1, 65536]")
    prefix: int = ranged(1, "[1, 65536]")

    def size(self, block_length: int) -> int:
        """Values of the keys, for a block of `block_length`."""
        return self.layers * self.heads * self.width * (self.prefix + block_length)


@dataclass
class TokenSettings(Checked, prefix="tokens."):
    """Uniform action tokens; see `ceed_vla.tokens.uniform`.

    Attributes:
        low: Smallest action of every dimension [action units].
        high: Largest action of every dimension [action units].
        chunk_steps: Steps of a chunk.
        num_bins: Values of one token.
        ordered: Whether neighbouring tokens stand for neighbouring actions.
    """

    low: list[float] = ranged([], "[-1e9, 1e9]")
    high: list[float] = ranged([], "[-1e9, 1e9]")
    chunk_steps: int = ranged(1, "[1, 4096]")
    num_bins: int = ranged(255, "[2, 65536]")
    ordered: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = list(zip(self.low, self.high, strict=False))
        if len(self.low) != len(self.high) or not pairs or any(not a < b for a, b in pairs):
            raise ConfigError(
                f"tokens.low is {short(self.low)} and tokens.high {short(self.high)}; there must "
                "be one of each per action dimension, low below high."
            )


@dataclass
class ExportSettings(Checked):
    """What an export holds beside its graphs.

    Attributes:
        family: Model family.
        version: Version of this package that wrote it.
        cameras: Features of the cameras, in the order of their stems.
        image_size: Side of the images [px].
        state: The state vector.
        vocabulary: Words of the instructions, sorted.
        max_words: Longest instruction [words].
        tokens: Action tokens.
        cache: Sizes of the cache.
        n_action_steps: Steps of a chunk that are executed by default.
        decoding: The checkpoint's own decoding.
        decodings: Its own names for decoders.
        files: Graph file -> SHA-256.
    """

    version: str
    cameras: list[str]
    state: StateSettings
    vocabulary: list[str]
    tokens: TokenSettings
    cache: CacheSettings
    decoding: DecodingConfig
    files: dict[str, str]
    family: str = chosen("compact", FAMILIES)
    image_size: int = ranged(96, "[1, 4096]")
    max_words: int = ranged(12, "[1, 4096]")
    n_action_steps: int = ranged(1, "[1, 4096]")
    decodings: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.tokens.chunk_steps:
            raise ConfigError(
                f"n_action_steps is {self.n_action_steps}; it must be in [1, "
                f"{self.tokens.chunk_steps}], as a chunk has {self.tokens.chunk_steps} steps."
            )
        WordIds(self.vocabulary, self.max_words)
        length = self.tokens.chunk_steps * len(self.tokens.low)
        values = self.cache.size(length) + len(self.tokens.low) * self.tokens.num_bins
        if length > MOST_TOKENS or values > MOST_VALUES:
            raise ConfigError(
                f"A block of {length} tokens with a cache of {values} values is too large; at most "
                f"{MOST_TOKENS} and {MOST_VALUES} are supported."
            )
        wanted = graph_names(len(self.cameras))
        if set(self.files) != set(wanted):
            raise ConfigError(
                f"files has {', '.join(sorted(self.files)) or 'nothing'}; it must have "
                f"{', '.join(wanted)}."
            )

    def write(self, folder: Path) -> None:
        """Write the file `SETTINGS` into a folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


_PARTS = {
    "state": StateSettings,
    "tokens": TokenSettings,
    "cache": CacheSettings,
    "decoding": DecodingConfig,
}


def graph_names(cameras: int) -> list[str]:
    """Names of the graph files of an export."""
    return [*(f"stem_{camera}.onnx" for camera in range(cameras)), "trunk.onnx", "block.onnx"]


def read_settings(folder: Path) -> ExportSettings:
    """Read and validate the settings of an export.

    Raises:
        CheckpointError: The file is missing, damaged, or of another format.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is not an export: it has no {SETTINGS}. Make one with `ceed-vla export`."
        )
    raw = read_json(file)
    if raw.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has the format {short(raw.get('format'))}; this version reads {FORMAT}. "
            "Export the checkpoint again."
        )
    try:
        return _built(ExportSettings, {k: v for k, v in raw.items() if k != "format"}, _PARTS)
    except ConfigError as error:
        raise CheckpointError(f"{file} cannot be used ({error}). Export again.") from error


def _built[T](kind: type[T], raw: Mapping[str, Any], parts: Mapping[str, type]) -> T:
    """A dataclass of a JSON object, whose `parts` are dataclasses too."""
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if unknown := set(raw) - known:
        raise ConfigError(f"it has the unknown entry {short(min(unknown))}")
    values = dict(raw)
    for name, part in parts.items():
        if not isinstance(values.get(name), dict):
            raise ConfigError(f"{name} is {short(values.get(name))}; it must be an object")
        values[name] = _built(part, values[name], {})
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"an entry is missing ({error})") from error


def read_graph(folder: Path, name: str, digest: str) -> bytes:
    """Read a graph file of an export and check its hash.

    The graph is loaded from these bytes, so that it can refer to no other file.

    Raises:
        CheckpointError: The file is missing, too large, or differs from its hash.
    """
    file = folder / name
    content = read_bytes(file, CheckpointError, most=MOST_GRAPH)
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise CheckpointError(
            f"{file} differs from the hash in {SETTINGS} ({found[:12]}, not {digest[:12]}); it is "
            "damaged or of another export. Copy the whole folder again."
        )
    return content
