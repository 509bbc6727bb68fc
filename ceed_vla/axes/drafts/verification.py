"""Drafts: the next tokens are guessed cheaply, and all layers verify them in one forward. The
result is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.backbones.capabilities import ComparesDepths, require
from ceed_vla.decoding.host import check_rows, row_sums, to_host
from ceed_vla.decoding.jacobi import Span, jacobi_iteration
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.decoding.rows import Rows
from ceed_vla.errors import ConfigError


class Drafter:
    """Guesses the next tokens."""

    # Whether the first forward computes the whole block, so that its tail is a warm start.
    whole_first: ClassVar[bool] = False
    length: int  # of a draft
    # Exits whose tokens `saw` wants, in the place of those that a forward verifies.
    depths: Sequence[int] = ()

    def draft(
        self, backbone: Backbone, prefix: Prefix, tokens: Tensor, rows: Rows, exact: int, end: int
    ) -> int:
        """Write into `tokens` (B, n) what may follow the proven ones of every running row, up to
        slot ``end - 1``.

        `exact` are the leading tokens that are proven in all of them. Returns layers that ran.
        """
        raise NotImplementedError

    def saw(self, depth: int, right: int, total: int) -> None:
        """Of `total` tokens that an exit would have drafted, so many were `right`."""


@torch.no_grad()
def decode_drafts(
    backbone: Backbone, prefix: Prefix, request: BlockRequest, drafter: Drafter, near: int = 0
) -> DecodeResult:
    """Greedy tokens: drafts, each verified by one forward, which is right up to the first wrong
    token and one behind.

    Within `near` bins a drafted token stays (arXiv 2507.22424); such rows end as "near", exact up
    to the first of them.

    Raises:
        TokenError: No guess where one is needed, or a guess or frozen tokens that do not fit.
        ConfigError: Tokens of variable length, or settings that only Jacobi decoding has.
        NotFiniteError: Scores of a running row are NaN or infinite.
    """
    check_drafts(request, near)
    block = DraftedBlock(backbone, prefix, request, drafter)
    rows = block.rows
    observers, recorder = request.observers(block.tokens)
    near_tokens = NearTokens(request, near, len(block.tokens), backbone.block_length)
    calls = np.zeros(len(block.tokens), dtype=np.int64)  # (B,) layers that ran
    while rows.running.any():
        span = block.next_span(prefix)
        drafted = drafter.draft(backbone, prefix, block.tokens, rows, rows.proven, span.end)
        calls += rows.running * (drafted + backbone.num_layers)
        before = block.tokens[:, span.first : span.end].clone()  # (B, k)
        shallow = block.exit_tokens(backbone, prefix, span)
        _, best, new = jacobi_iteration(backbone, prefix, block.tokens, span, rows.running)
        old, fresh, sums, *others = to_host(before, new, row_sums(best), *shallow)
        check_rows(sums, rows.running)
        block.forwards += 1
        known = rows.exact.copy()
        close = near_tokens.close(old, fresh, span, rows)  # (B, k)
        rows.accept(old, np.where(close, old, fresh), span.first)
        if close.any():
            mask = torch.from_numpy(close).to(new.device)
            block.tokens[:, span.first : span.end] = torch.where(mask, before, new)
            near_tokens.keep(close, span, rows)
        block.tell(drafter, fresh, others, known, span)
        rows.end_proven(block.watched, block.forwards)
        for observe in observers:
            observe(block.tokens, np.minimum(rows.exact, near_tokens.exact), block.forwards)
        if rows.running.any():
            prefix.cache.commit(rows.proven - 1 - prefix.cache.committed)
    states = recorder.states if recorder else None
    result = rows.result(block.tokens, block.forwards, states)
    result.layer_forwards = torch.from_numpy(calls)
    near_tokens.mark(result)
    return result


def check_drafts(request: BlockRequest, near: int = 0) -> None:
    """Raise `ConfigError` for a request that drafts cannot serve."""
    if request.stop is not None or request.tokens_per_step is None:
        raise ConfigError(
            "Drafts (ngram, spec, del) are of blocks of fixed length; variable lengths need jacobi."
        )
    if near and not request.ordered:
        raise ConfigError("Drafts that are only near (spec<K>x<L>r<R>) need tokens that are bins.")
    request.refuse_jacobi_settings()


class DraftedBlock:
    """The state of a block between forwards; attributes as in `JacobiBlock`."""

    def __init__(
        self, backbone: Backbone, prefix: Prefix, request: BlockRequest, drafter: Drafter
    ) -> None:
        self.drafter = drafter
        self.length = backbone.block_length
        self.tokens, self.given, self.watched = request.begin(
            backbone, prefix, guessed=drafter.whole_first
        )
        check_rows(row_sums(prefix.logits.amax(-1, keepdim=True)).cpu().numpy())
        self.rows = Rows(len(self.tokens), self.length, max(self.given, 1))
        self.forwards = 0
        reason = "stable" if self.watched < self.length else "converged"
        self.rows.end(self.rows.exact >= self.watched, reason, 0)

    def next_span(self, prefix: Prefix) -> Span:
        """The slots that the next forward verifies; behind right drafts one more is known."""
        first = max(prefix.cache.committed + 1, self.given)
        if self.drafter.whole_first and not self.forwards:
            return Span(first, self.length)
        return Span(first, min(self.watched, self.rows.proven + self.drafter.length + 1))

    def exit_tokens(self, backbone: Backbone, prefix: Prefix, span: Span) -> list[Tensor]:
        """What every exit would have drafted (B, k).

        No layer call is counted: these are the verifying forward's first layers again.
        """
        if not self.drafter.depths:
            return []
        start = prefix.cache.committed
        reader = require(backbone, ComparesDepths, "A draft that compares exits")
        logits, _ = reader.depth_logits(
            prefix, self.tokens[:, start : span.end - 1], self.drafter.depths
        )
        return [scores[:, span.first - start - 1 :].argmax(-1) for scores in logits]

    def tell(
        self,
        drafter: Drafter,
        fresh: np.ndarray,
        others: Sequence[np.ndarray],
        known: np.ndarray,
        span: Span,
    ) -> None:
        """Tell the drafter how many tokens of every exit were right.

        Args:
            drafter: Who asked.
            fresh: (B, k) what the forward found.
            others: (B, k) of every exit.
            known: (B,) tokens that were proven before.
            span: Where these slots are.
        """
        slots = np.arange(span.first, span.end)
        # (B, k): what was read before these was right.
        fair = self.rows.running[:, None] & (slots >= known[:, None])
        fair &= slots < self.rows.exact[:, None]
        for depth, tried in zip(drafter.depths, others, strict=True):
            drafter.saw(depth, int(((tried == fresh) & fair).sum()), int(fair.sum()))


class NearTokens:
    """Drafted tokens that stay although they are only near the right ones.

    Args:
        request: It says which dimensions stay exact.
        near: Bins.
        batch: Rows.
        block_length: Slots.
    """

    def __init__(self, request: BlockRequest, near: int, batch: int, block_length: int) -> None:
        dims = np.arange(block_length) % (request.tokens_per_step or 1)
        self.loose = np.isin(dims, request.exact_dims, invert=True)  # (n,)
        self.near = near
        self.block_length = block_length
        self.exact = np.full(batch, block_length)  # tokens in front of the first that is only near

    def close(self, old: np.ndarray, fresh: np.ndarray, span: Span, rows: Rows) -> np.ndarray:
        """Which drafted tokens `old` (B, k) stay where a forward found `fresh` (B, k)."""
        apart = np.abs(fresh - old)
        close = (apart > 0) & (apart <= self.near) & self.loose[span.first : span.end]
        close &= rows.running[:, None]
        close[:, -1] &= rows.exact > span.end - 1  # the last slot holds no draft
        return close

    def keep(self, close: np.ndarray, span: Span, rows: Rows) -> None:
        """Remember where rows stopped being exact."""
        slots = np.arange(span.first, span.end)
        accepted = np.where(close & (slots < rows.exact[:, None]), slots, self.block_length)
        self.exact = np.minimum(self.exact, accepted.min(1))

    def mark(self, result: DecodeResult) -> None:
        """Say in the result which rows are only near."""
        exact = torch.from_numpy(self.exact)
        result.exact_tokens = torch.minimum(result.exact_tokens, exact)
        result.exact &= exact >= self.block_length
        pairs = zip(result.exit_reason, self.exact, strict=True)
        result.exit_reason = [
            reason if row == self.block_length else "near" for reason, row in pairs
        ]
