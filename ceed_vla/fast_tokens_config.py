"""Settings of FAST tokens fitted on own data (`ceed_vla.fast_tokens`): ``--policy.action_tokens.type=fast``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ceed_vla.action_tokens_config import ActionTokensConfig
from ceed_vla.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ceed_vla.action_tokens import ActionTokens

_FITTED = ("action_low", "action_high", "scale", "gripper_dims", "max_tokens", "chunk_steps", "merges")
_HEADROOM = 1.25  # data recorded later, such as takeovers, may take a little longer


@ActionTokensConfig.register_subclass("fast")
@dataclass
class FastTokensConfig(ActionTokensConfig):
    """FAST (DCT + BPE, arXiv 2501.09747) fitted on the training data; a chunk takes as many tokens as it needs.

    `ceed-vla train` fits the tokens when it starts, `ceed-vla fit-tokens` writes them to a file for other trainers.
    A checkpoint holds them in its configuration.

    Attributes:
        path: File of `ceed-vla fit-tokens`; it replaces the fields below.
        vocabulary_size: Most FAST ids; the data may need fewer.
        scale: Quantisation: a DCT coefficient is rounded to ``1 / scale`` of half a range. Larger is finer and longer.
        action_low: Lower end of every action dimension [the data set's units]; the data's if empty.
        action_high: Upper end of every action dimension [the data set's units].
        gripper_dims: Two-valued action dimensions; they decode to the nearer range end exactly.
        max_tokens: Slots ``n`` of a block; a quarter more than the longest chunk of the data if 0.
        chunk_steps: Steps of the chunks that were fitted; filled by the fit.
        symbols: Smallest and largest coefficient; filled by the fit.
        merges: Pairs of ids that BPE joins; filled by the fit.
    """

    ordered = False

    path: str = ""
    vocabulary_size: int = 1024
    scale: float = 10.0
    action_low: list[float] = field(default_factory=list)
    action_high: list[float] = field(default_factory=list)
    max_tokens: int = 0
    chunk_steps: int = 0
    symbols: list[int] = field(default_factory=list)
    merges: str = ""

    def __post_init__(self) -> None:
        if (
            self.vocabulary_size < 2
            or not (math.isfinite(self.scale) and self.scale > 0)
            or self.max_tokens < 0
        ):
            raise ConfigError(
                f"vocabulary_size is {self.vocabulary_size} (at least 2), scale {self.scale} (positive) and "
                f"max_tokens {self.max_tokens} (0 or the slots of a block)."
            )
        if len(self.action_low) != len(self.action_high):
            raise ConfigError(
                f"action_low has {len(self.action_low)} values and action_high {len(self.action_high)}; "
                "give one of each for every action dimension."
            )
        if self.path and not self.fitted:
            self._read(Path(self.path))

    @property
    def fitted(self) -> bool:
        """Whether the tokens are known."""
        return bool(self.symbols)

    @property
    def vocabulary(self) -> int:
        self._check_fitted()
        least, most = self.symbols
        return most - least + 1 + len(self.merges.split()) + 1  # and the stop token

    def block_length(self, chunk_steps: int, action_dim: int) -> int:
        self._check_fitted()
        return self.max_tokens

    def fit(self, action_dim: int, action_stats: Mapping[str, Any] | None) -> None:
        self._check_fitted()

    def fit_chunks(self, chunks: Tensor) -> None:
        """Fit the tokens on every chunk (N, m, A) of the training data; does nothing if they are known.

        Raises:
            ConfigError: Chunks that define no tokens, or ranges of another action.
        """
        from ceed_vla.action_tokens import ranges_from_stats
        from ceed_vla.fast_tokens import fit_codec

        if self.fitted:
            return
        dim = int(chunks.shape[-1])
        if not self.action_low:
            flat = chunks.flatten(0, 1).double()
            stats = {"min": flat.amin(0), "max": flat.amax(0)}
            self.action_low, self.action_high = ranges_from_stats(stats, "min_max", self.gripper_indices(dim))
        self.validate_features(dim)
        codec, longest = fit_codec(
            chunks, self.action_low, self.action_high, self.vocabulary_size, self.scale
        )
        assert codec.most is not None
        self.symbols, self.chunk_steps = [codec.least, codec.most], int(chunks.shape[1])
        self.merges = " ".join(f"{left}+{right}" for left, right in codec.merges)
        most = self.chunk_steps * dim  # a token stands for one coefficient at least
        self.max_tokens = self.max_tokens or min(math.ceil(_HEADROOM * longest), most)

    def build(self, chunk_steps: int, action_dim: int) -> ActionTokens:
        from ceed_vla.fast_codec import FastCodec
        from ceed_vla.fast_tokens import FastTokenizer

        self._check_fitted()
        if chunk_steps != self.chunk_steps:
            raise ConfigError(
                f"The FAST tokens were fitted on chunks of {self.chunk_steps} steps, the policy's have {chunk_steps}; "
                "fit them again."
            )
        pairs = [(int(a), int(b)) for a, _, b in (merge.partition("+") for merge in self.merges.split())]
        codec = FastCodec.from_merges(pairs, self.scale, *self.symbols)
        grippers = self.gripper_indices(action_dim)
        return FastTokenizer(self.action_low, self.action_high, chunk_steps, codec, self.max_tokens, grippers)

    def validate_features(self, action_dim: int) -> None:
        super().validate_features(action_dim)
        if self.action_low and len(self.action_low) != action_dim:
            raise ConfigError(
                f"action_low/action_high have {len(self.action_low)} values, the action has {action_dim}."
            )

    def write(self, file: str | Path) -> Path:
        """Write the fitted tokens to a JSON file that `path` reads."""
        self._check_fitted()
        values = {key: value for key, value in asdict(self).items() if key != "path"}
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values) + "\n")
        return path

    def _read(self, file: Path) -> None:
        try:
            values = json.loads(file.read_text())
            for name in ("symbols", "vocabulary_size", *_FITTED):
                setattr(self, name, values[name])
        except FileNotFoundError as error:
            raise CheckpointError(
                f"There is no file {file}; write one with `ceed-vla fit-tokens`."
            ) from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{file} holds no fitted tokens ({error!r}).") from error

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise ConfigError(
                "The FAST tokens are not fitted yet: `ceed-vla train` does it when it starts; for other trainers run "
                "`ceed-vla fit-tokens` on the data, then set --policy.action_tokens.path to its file."
            )
