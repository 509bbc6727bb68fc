"""Draft and verify: cheap guesses of the next tokens, which all layers verify in one forward.

The result is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.finite import check_rows
from ceed_vla.decoding.host import result_of, row_sums, to_host
from ceed_vla.decoding.jacobi import jacobi_iteration
from ceed_vla.decoding.loop import Span
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.decoding.rows import Rows
from ceed_vla.errors import ConfigError


class Drafter:
    """Drafts the next tokens."""

    # Whether the first forward computes the whole block, so that its tail is a warm start.
    whole_first: ClassVar[bool] = False
    length: int  # of a draft [tokens]
    # Depths of the exits whose predictions `update` compares with the verified tokens.
    depths: Sequence[int] = ()

    def draft(
        self, backbone: Backbone, prefix: Prefix, tokens: Tensor, rows: Rows, exact: int, end: int
    ) -> int:
        """Write a draft into `tokens`, behind the proven tokens of every running row.

        Args:
            backbone: The model.
            prefix: The prefix, which the block follows.
            tokens: (B, n) the state, changed in place up to slot ``end - 1``.
            rows: Progress of the rows.
            exact: Leading tokens that are proven in all running rows.
            end: End of the drafted slots.

        Returns:
            Layers that ran.
        """
        raise NotImplementedError

    def verifier(self, backbone: Backbone) -> Backbone:
        """The model whose next forward verifies the draft."""
        return backbone

    def predictions(self) -> list[Tensor]:
        """The tokens (B, k) of each exit, behind the k tokens that the verifying forward read."""
        return []

    def update(self, depth: int, right: int, total: int) -> None:
        """Record that `right` of `total` tokens that the exit at `depth` predicts were right."""


@torch.no_grad()
def decode_drafts(
    backbone: Backbone, prefix: Prefix, request: BlockRequest, drafter: Drafter, near: int = 0
) -> DecodeResult:
    """Decode greedy tokens with drafts, each verified by one forward.

    A forward accepts the draft up to its first wrong token, and corrects that one. A drafted token
    within `near` bins of the right one is accepted too (arXiv 2507.22424); its row ends as "near",
    and is exact up to the first of these tokens.

    Raises:
        TokenError: A needed guess is missing, or the guess or the frozen tokens do not fit.
        ConfigError: Tokens have variable length, or settings are set that only Jacobi decoding
            supports.
        NotFiniteError: The logits of a running row are NaN or infinite.
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
        before = block.tokens[:, span.start : span.end].clone()  # (B, k)
        first = span.start - prefix.cache.committed - 1  # slots that were proven before
        _, best, new = jacobi_iteration(
            drafter.verifier(backbone), prefix, block.tokens, span, rows.running
        )
        shallow = [found[:, first:] for found in drafter.predictions()]
        old, fresh, sums, *others = to_host(before, new, row_sums(best), *shallow)
        check_rows(sums, rows.running)
        block.forwards += 1
        known = rows.exact.copy()
        close = near_tokens.close(old, fresh, span, rows)  # (B, k)
        rows.accept(old, np.where(close, old, fresh), span.start)
        if close.any():
            mask = torch.from_numpy(close).to(new.device)
            block.tokens[:, span.start : span.end] = torch.where(mask, before, new)
            near_tokens.record(close, span, rows)
        block.report(drafter, fresh, others, known, span)
        rows.end_proven(block.watched, block.forwards)
        for observe in observers:
            observe(block.tokens, np.minimum(rows.exact, near_tokens.exact), block.forwards)
        if rows.running.any():
            prefix.cache.commit(rows.proven - 1 - prefix.cache.committed)
    states = recorder.states if recorder else None
    result = result_of(rows, block.tokens, block.forwards, states)
    result.layer_forwards = torch.from_numpy(calls)
    near_tokens.mark(result)
    return result


def check_drafts(request: BlockRequest, near: int = 0) -> None:
    """Raise `ConfigError` for a request that drafts do not support."""
    if request.stop is not None or request.tokens_per_step is None:
        raise ConfigError(
            "Drafts (ngram, spec, del) need blocks of fixed length; use jacobi for variable ones."
        )
    if near and not request.ordered:
        raise ConfigError(
            f"The decoder accepts drafted tokens within {near} bins, but neighbouring tokens of "
            "this vocabulary do not stand for neighbouring actions; use spec<K>x<L> without r<R>."
        )
    request.refuse_jacobi_settings()


class DraftedBlock:
    """The state of a block between forwards; attributes as in `JacobiBlock`."""

    def __init__(
        self, backbone: Backbone, prefix: Prefix, request: BlockRequest, drafter: Drafter
    ) -> None:
        self.drafter = drafter
        self.length = backbone.block_length
        self.tokens, self.frozen, self.watched = request.begin(
            backbone, prefix, guessed=drafter.whole_first
        )
        check_rows(row_sums(prefix.logits.amax(-1, keepdim=True)).cpu().numpy())
        self.rows = Rows(len(self.tokens), self.length, max(self.frozen, 1))
        self.forwards = 0
        reason = "stable" if self.watched < self.length else "converged"
        self.rows.end(self.rows.exact >= self.watched, reason, 0)

    def next_span(self, prefix: Prefix) -> Span:
        """The slots that the next forward verifies: the draft, and one more behind it."""
        start = max(prefix.cache.committed + 1, self.frozen)
        if self.drafter.whole_first and not self.forwards:
            return Span(start, self.length)
        return Span(start, min(self.watched, self.rows.proven + self.drafter.length + 1))

    def report(
        self,
        drafter: Drafter,
        fresh: np.ndarray,
        others: Sequence[np.ndarray],
        known: np.ndarray,
        span: Span,
    ) -> None:
        """Report to the drafter how many predictions of every exit were right.

        Args:
            drafter: The drafter.
            fresh: (B, k) the tokens that the verifying forward computed.
            others: Per exit (B, k), the tokens that it predicts.
            known: (B,) leading tokens that were proven before this forward.
            span: The slots.
        """
        slots = np.arange(span.start, span.end)
        # (B, k): predictions count only where all tokens in front of them were right.
        fair = self.rows.running[:, None] & (slots >= known[:, None])
        fair &= slots < self.rows.exact[:, None]
        for depth, tried in zip(drafter.depths, others, strict=True):
            drafter.update(depth, int(((tried == fresh) & fair).sum()), int(fair.sum()))


class NearTokens:
    """Drafted tokens that are accepted although they are only near the right ones.

    Args:
        request: The block request; its `exact_dims` must stay exact.
        near: Greatest distance of an accepted token [bins].
        batch: Rows ``B``.
        block_length: Tokens ``n``.
    """

    def __init__(self, request: BlockRequest, near: int, batch: int, block_length: int) -> None:
        dims = np.arange(block_length) % (request.tokens_per_step or 1)
        self.loose = np.isin(dims, request.exact_dims, invert=True)  # (n,)
        self.near = near
        self.block_length = block_length
        self.exact = np.full(batch, block_length)  # (B,) tokens in front of the first near one

    def close(self, old: np.ndarray, fresh: np.ndarray, span: Span, rows: Rows) -> np.ndarray:
        """Which drafts `old` (B, k) are accepted where the forward computed `fresh` (B, k)."""
        apart = np.abs(fresh - old)
        close = (apart > 0) & (apart <= self.near) & self.loose[span.start : span.end]
        close &= rows.running[:, None]
        close[:, -1] &= rows.exact > span.end - 1  # the last slot holds no draft
        return close

    def record(self, close: np.ndarray, span: Span, rows: Rows) -> None:
        """Record the first near token of every row."""
        slots = np.arange(span.start, span.end)
        accepted = np.where(close & (slots < rows.exact[:, None]), slots, self.block_length)
        self.exact = np.minimum(self.exact, accepted.min(1))

    def mark(self, result: DecodeResult) -> None:
        """Mark the rows with near tokens in the result."""
        exact = torch.from_numpy(self.exact)
        result.exact_tokens = torch.minimum(result.exact_tokens, exact)
        result.exact &= exact >= self.block_length
        pairs = zip(result.exit_reason, self.exact, strict=True)
        result.exit_reason = [
            reason if row == self.block_length else "near" for reason, row in pairs
        ]
