"""Which tokens can still complete a chunk of variable length: decoding under it always ends in a
whole chunk.

The tokens of a fitted FAST vocabulary stand for fixed numbers of coefficients, and a chunk has ``m
* A`` of them. So a slot may hold a token only if the rest can be reached in the slots behind it,
and the stop token only if nothing is left. What a slot may hold depends on the tokens before it, as
its logits do: the model stays causal, and what holds for Jacobi decoding (the fixed point is the
greedy block) holds under a grammar too.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import ReadsDepths, require

# Score of a forbidden token: finite, so that only a broken model has scores that are not.
FORBIDDEN = -1e30


class Grammar:
    """Tokens as numbers of coefficients: `lengths` (V,) int64, at least 1 of every token, and 0 of
    the `stop` token.

    A chunk has `total` of them, and `block_length` slots are enough for some chunk.
    """

    def __init__(self, lengths: Tensor, stop: int, total: int, block_length: int) -> None:
        self.lengths = lengths
        self.stop = stop
        self.total = total
        self.block_length = block_length
        # tokens that make 0 .. total coefficients
        sizes = {int(v) for v in lengths if v > 0}
        fewest = [0]
        for size in range(1, total + 1):
            fewest.append(
                1
                + min((fewest[size - length] for length in sizes if length <= size), default=total)
            )
        self.fewest = torch.tensor(fewest)  # (total + 1,)

    def allowed(self, used: Tensor, slots: Tensor) -> Tensor:
        """Tokens (B, k, V) that `slots` (k,) may hold behind `used` (B, k) coefficients; none if no
        chunk begins so.
        """
        left = (self.total - used).unsqueeze(-1) - self.lengths  # (B, k, V) behind the token
        behind = (self.block_length - 1 - slots).unsqueeze(-1)  # (k, 1) slots behind
        allowed = (left >= 0) & (self.fewest[left.clamp(min=0)] <= behind)
        allowed[..., self.stop] = used >= self.total
        return allowed


class GrammarBackbone:
    """`backbone` with the scores of tokens that cannot complete a chunk set to `FORBIDDEN`.

    `prefix` is the one that it will decode behind; the attribute is the same under the grammar.
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
        # of slots so far
        self._lengths = torch.zeros(batch, self.block_length, dtype=torch.int64, device=device)
        nothing = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        first = torch.zeros(1, device=device)
        logits = self._mask(prefix.logits.unsqueeze(1), nothing, first.long()).squeeze(1)
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
        # The committed slots came in earlier calls.
        self._lengths[:, start : start + k] = self.grammar.lengths[tokens]
        used = self._lengths[:, : start + k].cumsum(1)[:, start:]  # (B, k)
        return self._mask(
            logits, used, torch.arange(start + 1, start + k + 1, device=tokens.device)
        )

    def _mask(self, logits: Tensor, used: Tensor, slots: Tensor) -> Tensor:
        least = max(torch.finfo(logits.dtype).min, FORBIDDEN)
        return logits.masked_fill(~self.grammar.allowed(used, slots), least)
