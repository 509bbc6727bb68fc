"""FAST tokens that are fitted to the training data (``--policy.action_tokens.type=fast``): the ids
of a `FastCodec`, and a stop token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ceed_vla.errors import CheckpointError, ConfigError, TokenError, raised_as
from ceed_vla.fields import check_fields, ranged
from ceed_vla.files import read_json, write_text
from ceed_vla.tokens.base import ACTIONS, ActionTokens, ActionTokensConfig, check_ends, from_front
from ceed_vla.tokens.fast_codec import FastCodec
from ceed_vla.tokens.grammar import Grammar
from ceed_vla.tokens.uniform import ranges_from_stats
from ceed_vla.tokens.variable_length import VariableLengthTokens

_HEADROOM = 1.25  # later data, for example takeovers, may have longer chunks


@ActionTokensConfig.register_subclass("fast")
@dataclass
class FastTokensConfig(ActionTokensConfig):
    """FAST tokens (DCT + BPE, arXiv 2501.09747), fitted to the training data; chunks have different
    numbers of tokens.

    `ceed-vla train` fits the tokens when it starts, and `ceed-vla fit-tokens` writes them to a file
    for other trainers. A checkpoint stores them in its configuration.

    Attributes:
        path: File from `ceed-vla fit-tokens`, which replaces the fields below.
        most_ids: Maximum number of FAST ids; the data may need fewer.
        scale: Quantisation: DCT coefficients are rounded to ``1 / scale`` of half a range. A larger
            scale gives finer and longer chunks.
        action_low: Lower end of every action dimension [the dataset's units]; empty for the data's.
        action_high: Upper end of every action dimension [the dataset's units].
        gripper_dims: Two-valued action dimensions, which decode to the nearer end of their range.
            Training from data replaces [-1] by the dimensions with two values; count from the
            front to force one.
        max_tokens: Slots ``n`` of a block; 0 for 25 % more than the longest chunk of the data.
        chunk_steps: Steps of the fitted chunks; set by the fit.
        symbols: Smallest and largest coefficient; set by the fit.
        merges: Pairs of ids that BPE joins; set by the fit.
    """

    ordered = False
    listed = ("action_low", "action_high")

    path: str = ""
    most_ids: int = ranged(1024, "[2, 65536]")
    scale: float = ranged(10.0, "(0, 1e6]")
    action_low: list[float] = ranged([], ACTIONS)
    action_high: list[float] = ranged([], ACTIONS)
    max_tokens: int = ranged(0, "[0, 65536]")
    chunk_steps: int = ranged(0, "[0, 4096]")
    symbols: list[int] = ranged([], "[-1e9, 1e9]")
    merges: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ends(self.action_low, self.action_high)
        if self.path and not self.fitted:
            self._read(Path(self.path))
        if self.symbols and not (len(self.symbols) == 2 and self.symbols[0] <= self.symbols[1]):
            raise ConfigError(
                f"symbols is {self.symbols[:5]}; it must be the smallest and the largest "
                "coefficient."
            )

    @property
    def fitted(self) -> bool:
        """Whether the tokens are fitted."""
        return bool(self.symbols)

    @property
    def vocabulary_size(self) -> int:
        self._check_fitted()
        least, most = self.symbols
        return most - least + 1 + len(self.merges.split()) + 1  # and the stop token

    def block_length(self, chunk_steps: int, action_dim: int) -> int:
        self._check_fitted()
        return self.max_tokens

    def fit(self, action_dim: int, action_stats: Mapping[str, Any] | None) -> None:
        self._check_fitted()

    def fit_chunks(self, chunks: Tensor) -> None:
        """Fit the tokens to all chunks (N, m, A) of the training data, unless they are fitted
        already.
        """
        if self.fitted:
            return
        dim = int(chunks.shape[-1])
        if not self.action_low:
            flat = chunks.flatten(0, 1).double()
            stats = {"min": flat.amin(0), "max": flat.amax(0)}
            self.action_low, self.action_high = ranges_from_stats(
                stats, "min_max", self.gripper_indices(dim)
            )
        self.validate_features(dim)
        low, high = (
            torch.tensor(ends, dtype=torch.float64) for ends in (self.action_low, self.action_high)
        )
        scaled = normalise(chunks.cpu().double().clamp(low, high), low, high)
        codec = FastCodec.fit(scaled, self.most_ids, self.scale)
        assert codec.most is not None
        self.symbols = [codec.least, codec.most]
        self.chunk_steps = int(chunks.shape[1])
        self.merges = " ".join(f"{left}+{right}" for left, right in codec.merges)
        longest = max(map(len, codec.encode(scaled)))
        most = self.chunk_steps * dim  # each token stands for at least one coefficient
        self.max_tokens = self.max_tokens or min(math.ceil(_HEADROOM * longest), most)

    def build(self, chunk_steps: int, action_dim: int) -> ActionTokens:
        self._check_fitted()
        if chunk_steps != self.chunk_steps:
            raise ConfigError(
                f"The FAST tokens were fitted to chunks of {self.chunk_steps} steps, but the "
                f"policy's have {chunk_steps}; fit them again."
            )
        with raised_as(ConfigError, "merges must be pairs of ids", "fit the tokens again."):
            pairs = [
                (int(a), int(b))
                for a, _, b in (merge.partition("+") for merge in self.merges.split())
            ]
        codec = FastCodec.from_merges(pairs, self.scale, *self.symbols)
        return FastTokenizer(self, codec)

    def write(self, file: str | Path) -> Path:
        """Write the fitted tokens to a JSON file that `path` reads."""
        self._check_fitted()
        write_text(
            Path(file), json.dumps({name: getattr(self, name) for name in self._stored()}) + "\n"
        )
        return Path(file)

    def _stored(self) -> list[str]:
        """Names of the fields in a file of fitted tokens."""
        return [item.name for item in fields(self) if item.name != "path"]

    def _read(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"There is no file {file}; write one with `ceed-vla fit-tokens`.")
        values = read_json(file)
        if "most_ids" not in values and "vocabulary_size" in values:  # its name until format 1
            values["most_ids"] = values["vocabulary_size"]
        if lacking := [name for name in self._stored() if name not in values]:
            raise CheckpointError(
                f"{file} has no fitted tokens: it lacks {', '.join(lacking)}. Write it with "
                "`ceed-vla fit-tokens`."
            )
        for name in self._stored():
            setattr(self, name, values[name])
        with raised_as(
            CheckpointError, f"{file} has no fitted tokens", "fit them again.", CheckpointError
        ):
            check_fields(self)

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise ConfigError(
                "The FAST tokens are not fitted yet. `ceed-vla train` fits them when it starts; "
                "for other trainers, run `ceed-vla fit-tokens` on the data and set "
                "--policy.action_tokens.path to its file."
            )


class FastTokenizer(VariableLengthTokens):
    """FAST ids of a fitted `FastCodec`, then the stop token.

    The range [low, high] of every dimension [action units] is mapped to [-1, 1] before the cosine
    transform; values outside are clipped and counted. Grippers decode exactly to the nearer end of
    their range.

    Raises:
        ConfigError: The ranges do not define a scale, or a block is too short for a chunk of zeros.
    """

    def __init__(self, settings: FastTokensConfig, codec: FastCodec) -> None:
        low, high = settings.action_low, settings.action_high
        self.low = torch.tensor([float(v) for v in low], dtype=torch.float64)  # (A,)
        self.high = torch.tensor([float(v) for v in high], dtype=torch.float64)  # (A,)
        if len(low) != len(high) or not len(low) or not bool((self.low < self.high).all()):
            raise ConfigError(
                f"action_low is {list(low)} and action_high {list(high)}; low must be below high "
                "in every dimension."
            )
        self.action_dim = len(low)
        self.chunk_steps = settings.chunk_steps
        self.block_length = settings.max_tokens
        self.gripper_dims = from_front(settings.gripper_dims, self.action_dim)
        self.codec = codec
        self.stop = codec.vocabulary_size
        self.vocabulary_size = codec.vocabulary_size + 1
        self.speculative = torch.arange(self.vocabulary_size)
        lengths = torch.cat([codec.id_lengths(), torch.zeros(1, dtype=torch.int64)])  # (V,)
        total = self.chunk_steps * self.action_dim
        # Under the grammar, every decoded chunk is whole.
        self.grammar = Grammar(lengths, self.stop, total, self.block_length)
        # Number of chunks without their highest frequencies, because they did not fit into a block.
        self.smoothed = 0
        zero = torch.zeros(1, self.chunk_steps, self.action_dim, dtype=torch.float64)
        try:
            self.zero = self.encode(zero.clamp(self.low, self.high))[0]
        except TokenError as error:
            raise ConfigError(
                f"max_tokens is {self.block_length}, too few for a chunk of zeros; raise it."
            ) from error
        self.clipped = 0

    def _write(self, actions: Tensor) -> list[list[int]]:
        actions = actions.detach().cpu().double()
        inside = actions.clamp(self.low, self.high)
        self.clipped += int(((inside - actions).abs() > 1e-6 * (self.high - self.low)).sum())
        scaled = normalise(inside, self.low, self.high)
        rows = self.codec.encode(scaled)
        for row, ids in enumerate(rows):
            frequencies = self.chunk_steps
            while len(rows[row]) > self.block_length and frequencies > 1:
                frequencies -= 1
                rows[row] = self.codec.encode(scaled[row : row + 1], frequencies)[0]
            self.smoothed += rows[row] is not ids
        return rows

    def _read(self, tokens: list[int]) -> Tensor:
        chunk = self.codec.decode(tokens, self.chunk_steps, self.action_dim)
        # Rounded cosines overshoot a step by a few per cent, beyond the range of the data.
        chunk = ((chunk + 1) / 2 * (self.high - self.low) + self.low).clamp(self.low, self.high)
        for d in self.gripper_dims:
            middle = (self.low[d] + self.high[d]) / 2
            chunk[:, d] = torch.where(chunk[:, d] > middle, self.high[d], self.low[d])
        return chunk


def normalise(actions: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map every dimension of `actions` (..., A) from [low, high] to [-1, 1]."""
    return 2 * (actions - low) / (high - low) - 1
