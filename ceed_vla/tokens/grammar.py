"""Grammar of chunks of variable length: only tokens that can still complete a chunk are allowed, so
decoding always ends in a whole chunk.

Each token of a fitted FAST vocabulary stands for a fixed number of coefficients, and a chunk has
``m * A`` of them. So a token is allowed only if the slots behind it suffice for the remaining
coefficients, and the stop token only if none remain. Like the logits, the allowed tokens of a slot
depend only on earlier tokens. So the model remains causal, and the fixed point of Jacobi decoding
is the greedy block under the grammar too.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import ReadsDepths, require

# Logit of a forbidden token: finite, so that only damaged models have non-finite logits.
FORBIDDEN = -1e30


class Grammar:
    """The numbers of coefficients that tokens stand for, and which tokens they allow.

    Args:
        lengths: (V,) int64, coefficients of each token: at least 1, and 0 for the stop token.
        stop: The stop token.
        total: Coefficients of a chunk.
        block_length: Slots ``n`` of a block, which must suffice for some chunk.
    """

    def __init__(self, lengths: Tensor, stop: int, total: int, block_length: int) -> None:
        self.lengths = lengths
        self.stop = stop
        self.total = total
        self.block_length = block_length
        # Fewest tokens that stand for 0 .. total coefficients.
        sizes = {int(v) for v in lengths if v > 0}
        fewest = [0]
        for size in range(1, total + 1):
            fewest.append(
                1
                + min((fewest[size - length] for length in sizes if length <= size), default=total)
            )
        self.fewest = torch.tensor(fewest)  # (total + 1,)

    def allowed(self, used: Tensor, slots: Tensor) -> Tensor:
        """The tokens that are allowed in some slots.

        Args:
            used: (B, k) coefficients in front of each slot.
            slots: (k,) the slots.

        Returns:
            (B, k, V) bool; no token is allowed if no chunk starts with these coefficients.
        """
        left = (self.total - used).unsqueeze(-1) - self.lengths  # (B, k, V) behind the token
        behind = (self.block_length - 1 - slots).unsqueeze(-1)  # (k, 1) slots behind
        allowed = (left >= 0) & (self.fewest[left.clamp(min=0)] <= behind)
        allowed[..., self.stop] = used >= self.total
        return allowed


class GrammarBackbone:
    """A backbone whose logits of tokens that cannot complete a chunk are `FORBIDDEN`.

    Args:
        backbone: The backbone.
        prefix: The prefix, which the block follows.
        grammar: The grammar.

    Attributes:
        prefix: The same prefix, with logits under the grammar.
    """

    def __init__(self, backbone: Backbone, prefix: Prefix, grammar: Grammar) -> None:
        self.backbone = backbone
        self.grammar = grammar
        self.block_length, self.vocabulary_size = backbone.block_length, backbone.vocabulary_size
        self.num_layers = backbone.num_layers
        batch = prefix.logits.shape[0]
        device = prefix.logits.device
        grammar.lengths = grammar.lengths.to(device)
        grammar.fewest = grammar.fewest.to(device)
        # (B, n) coefficients of the tokens so far.
        self._lengths = torch.zeros(batch, self.block_length, dtype=torch.int64, device=device)
        nothing = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        slot = torch.zeros(1, dtype=torch.int64, device=device)
        logits = self._mask(prefix.logits.unsqueeze(1), nothing, slot).squeeze(1)
        self.prefix = replace(prefix, logits=logits)

    def prefill(self, observation: dict[str, Tensor]) -> Prefix:
        return self.backbone.prefill(observation)

    def block_logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        return self._allowed(prefix, tokens, self.backbone.block_logits(prefix, tokens))

    def shallow_logits(self, prefix: Prefix, tokens: Tensor, depth: int) -> Tensor:
        reader = require(self.backbone, ReadsDepths, "A forward of some layers")
        return self._allowed(prefix, tokens, reader.shallow_logits(prefix, tokens, depth))

    def shallow_layers(self, depth: int) -> int:
        return require(self.backbone, ReadsDepths, "A forward of some layers").shallow_layers(depth)

    def _allowed(self, prefix: Prefix, tokens: Tensor, logits: Tensor) -> Tensor:
        """`logits` (B, k, V) of the successors of `tokens` (B, k), under the grammar."""
        start = prefix.cache.committed
        k = tokens.shape[1]
        # Earlier calls have set the lengths of the committed slots.
        self._lengths[:, start : start + k] = self.grammar.lengths[tokens]
        used = self._lengths[:, : start + k].cumsum(1)[:, start:]  # (B, k)
        return self._mask(
            logits, used, torch.arange(start + 1, start + k + 1, device=tokens.device)
        )

    def _mask(self, logits: Tensor, used: Tensor, slots: Tensor) -> Tensor:
        least = max(torch.finfo(logits.dtype).min, FORBIDDEN)
        return logits.masked_fill(~self.grammar.allowed(used, slots), least)
