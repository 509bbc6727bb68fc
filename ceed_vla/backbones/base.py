"""What a decoder needs from a model: run the prefix once, then score block tokens behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ceed_vla.cache import BlockCache


@dataclass
class Prefix[C: BlockCache]:
    """A prefix that has been run.

    Attributes:
        logits: Scores (B, V) of the first action token.
        cache: Keys and values of the prefix; decoders write the block behind them.
    """

    logits: Tensor
    cache: C


class Backbone(Protocol):
    """A causal model over a block of action tokens.

    Attributes:
        block_length: Tokens ``n`` of one block.
        vocabulary_size: Action values ``V`` of one token. No other token has a score.
    """

    block_length: int
    vocabulary_size: int

    def prefill(self, observation: dict[str, Tensor]) -> Prefix:
        """Run the prefix of every row once."""
        ...

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """Score the successors of `tokens`.

        Args:
            prefix: From `prefill`.
            tokens: (B, k) in ``[0, V)``, in the block slots ``c .. c + k - 1`` with ``c =
                prefix.cache.committed``.

        Returns:
            Logits (B, k, V). Output ``i`` depends on the prefix, the committed tokens and ``tokens[:, :i +
            1]`` only (causal), and predicts slot ``c + i + 1``. Keys and values are written to the cache, not
            committed.
        """
        ...
