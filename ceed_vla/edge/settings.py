"""The settings of an export: one JSON file beside its graphs.

They hold everything but the weights: how observations are read, the action vocabulary, the
decoding, sizes of the cache, and the hash of every graph. `ceed_vla.export` writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.registry import find_exit
from ceed_vla.edge.feature_settings import TOKENIZER, ImageSettings, StateSettings, TextSettings
from ceed_vla.errors import CheckpointError, ConfigError
from ceed_vla.fields import Checked, chosen, ranged, short
from ceed_vla.files import read_bytes, read_json
from ceed_vla.folders import EXPORT
from ceed_vla.tokens.increments import check_dims

SETTINGS = EXPORT
FORMAT = 3
GRAPHS = {"compact": ("trunk", "block"), "llama": ("prefix", "embed", "layers")}  # behind stems
EXPORTED = ("ar", "jacobi")  # decoders that run on an export
EXPORTED_WEIGHTS = ("float32", "int8")
MOST_GRAPH = 1_600_000_000  # [bytes]
MOST_TOKENS = 65_536  # of a block
MOST_VALUES = 2**30  # of keys
MOST_ACTIONS = 2**24  # bins of all dimensions


@dataclass
class CacheSettings(Checked, prefix="cache."):
    """Sizes of the keys and values.

    Attributes:
        layers: Layers.
        heads: Heads of keys and values.
        width: Width of a head.
        prefix: Positions of the prefix; the most of a family whose prompts differ in length.
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
class CheckSettings(Checked, prefix="checks."):
    """The tokens of one decoder on one random observation.

    Attributes:
        seed: Seed of the observation, see `ceed_vla.edge.observation.random_observation`.
        decoder: Decoder name.
        tokens: (n,) tokens.
    """

    seed: int = ranged(0, "[0, 4294967295]")
    decoder: str = "ar"
    tokens: list[int] = ranged([], "[0, 65535]")


@dataclass
class ExportSettings(Checked):
    """What an export holds beside its graphs.

    Attributes:
        family: Model family, which decides the graphs: "compact", or "llama" (a language model).
        version: Version of this package that wrote it.
        images: The cameras.
        state: The state vector.
        text: The instructions.
        tokens: Action tokens.
        cache: Sizes of the cache.
        n_action_steps: Steps of a chunk that are executed by default.
        delta_dims: Action dimensions that are increments.
        action_names: Names of the action's dimensions; none if unknown.
        control_rate: Steps per second of the training data [Hz]; 0 if unknown.
        decoding: The checkpoint's own decoding.
        decodings: Its own names for decoders.
        files: Graph file, or tokenizer -> SHA-256.
        weights: Number type of the matrices behind the stems.
        checks: Tokens (n,) of a decoder on the random observation of a seed, which every
            `ceed_vla.edge.EdgePolicy` must reproduce.
    """

    version: str
    images: ImageSettings
    state: StateSettings
    text: TextSettings
    tokens: TokenSettings
    cache: CacheSettings
    decoding: DecodingConfig
    files: dict[str, str]
    family: str = chosen("compact", tuple(GRAPHS))
    weights: str = chosen("float32", EXPORTED_WEIGHTS)
    n_action_steps: int = ranged(1, "[1, 4096]")
    delta_dims: list[int] | None = None
    action_names: list[str] | None = None
    control_rate: float = ranged(0.0, "[0, 10000]")
    decodings: dict[str, str] | None = None
    checks: list[CheckSettings] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dims(self.delta_dims or [], len(self.tokens.low))
        if not 1 <= self.n_action_steps <= self.tokens.chunk_steps:
            raise ConfigError(
                f"n_action_steps is {self.n_action_steps}; it must be in [1, "
                f"{self.tokens.chunk_steps}], as a chunk has {self.tokens.chunk_steps} steps."
            )
        self._check_family()
        length = self.tokens.chunk_steps * len(self.tokens.low)
        values = self.cache.size(length)
        if length > MOST_TOKENS or values > MOST_VALUES:
            raise ConfigError(
                f"A block of {length} tokens with a cache of {values} values is too large; at most "
                f"{MOST_TOKENS} and {MOST_VALUES} are supported."
            )
        actions = len(self.tokens.low) * self.tokens.num_bins
        if actions > MOST_ACTIONS:
            raise ConfigError(
                f"{len(self.tokens.low)} dimensions with {self.tokens.num_bins} bins are too many; "
                f"at most {MOST_ACTIONS} bins in all are supported."
            )
        for check in self.checks or []:
            if len(check.tokens) != length or max(check.tokens) >= self.tokens.num_bins:
                raise ConfigError(
                    f"checks has tokens {short(check.tokens)}; there must be {length} of them, "
                    f"below {self.tokens.num_bins}."
                )
        wanted = [f"{name}.onnx" for name in graph_names(self)]
        wanted += [TOKENIZER] if self.text.kind == "prompt" else []
        if set(self.files) != set(wanted):
            raise ConfigError(
                f"files has {', '.join(sorted(self.files)) or 'nothing'}; it must have "
                f"{', '.join(wanted)}."
            )

    def _check_family(self) -> None:
        """Raise `ConfigError` unless observations are read as the family's graphs need them."""
        text = self.text
        words = text.kind == "words" and text.padded
        if self.family == "compact" and not (words and self.images.kind == "square"):
            raise ConfigError(
                f"family is compact with {self.images.kind} images and text of kind {text.kind}; "
                "it must be square images and padded words."
            )
        positions = text.longest + len(text.behind)
        if self.family == "llama" and positions > self.cache.prefix:
            raise ConfigError(
                f"text has up to {positions} ids and cache.prefix is {self.cache.prefix}; the "
                "cache must have a position for each."
            )

    def write(self, folder: Path) -> None:
        """Write the file `SETTINGS` into a folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


_PARTS = {
    "images": ImageSettings,
    "text": TextSettings,
    "state": StateSettings,
    "tokens": TokenSettings,
    "cache": CacheSettings,
    "decoding": DecodingConfig,
}


@contextmanager
def only_exported() -> Iterator[None]:
    """Add to a `ConfigError` about a decoder's name which decoders an export runs."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error} An export runs only ar, jacobi and their exits.") from error


def check_decoding(config: DecodingConfig) -> None:
    """Raise `ConfigError` for a decoding that does not run on an export."""
    if config.method not in EXPORTED:
        raise ConfigError(
            f"The decoder {config.method!r} does not run on an export; use ar, jacobi or exit "
            "rules, or run the checkpoint with torch."
        )
    if config.guess == "random":
        raise ConfigError(
            "The guess is 'random', which takes torch's random numbers; exports support 'previous' "
            "and 'mid'."
        )
    for name in config.exits:
        if not find_exit(name).home.startswith("ceed_vla.decoding."):
            raise ConfigError(
                f"The exit rule {name} does not run on an export; use conf<P>, gap<P>, agree<D>, "
                "changed<K>, cap<K> or deadline<MS>."
            )


def graph_names(settings: ExportSettings) -> list[str]:
    """Names of the graphs of an export: one stem per kind of camera, then those of its family."""
    stems = [f"stem_{number}" for number in sorted(set(settings.images.stems))]
    return [*stems, *GRAPHS[settings.family]]


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
        return built(ExportSettings, {k: v for k, v in raw.items() if k != "format"}, _PARTS)
    except ConfigError as error:
        raise CheckpointError(f"{file} cannot be used ({error}). Export again.") from error


def built[T](kind: type[T], raw: Mapping[str, Any], parts: Mapping[str, type]) -> T:
    """A dataclass of a JSON object, whose `parts` are dataclasses too; raises `ConfigError`."""
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if unknown := set(raw) - known:
        raise ConfigError(f"it has the unknown entry {short(min(unknown))}")
    values = dict(raw)
    for name, part in parts.items():
        if not isinstance(values.get(name), dict):
            raise ConfigError(f"{name} is {short(values.get(name))}; it must be an object")
        values[name] = built(part, values[name], {})
    if "checks" in values:
        values["checks"] = _built_checks(values["checks"])
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"an entry is missing ({error})") from error


def _built_checks(raw: Any) -> list[CheckSettings] | None:
    """The entry `checks` of a JSON object."""
    if raw is None:
        return None
    if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
        raise ConfigError(f"checks is {short(raw)}; it must be a list of objects")
    return [built(CheckSettings, item, {}) for item in raw]


def read_part(folder: Path, name: str, digest: str, most: int = MOST_GRAPH) -> bytes:
    """Read a graph, or the tokenizer, of an export and check its hash.

    A graph is loaded from these bytes, so that it can refer to no other file.

    Raises:
        CheckpointError: The file is missing, too large, or differs from its hash.
    """
    file = folder / name
    content = read_bytes(file, CheckpointError, most=most)
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise CheckpointError(
            f"{file} differs from the hash in {SETTINGS} ({found[:12]}, not {digest[:12]}); it is "
            "damaged or of another export. Copy the whole folder again."
        )
    return content
