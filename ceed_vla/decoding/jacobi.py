"""Parallel decoding of one block as a fixed point (Jacobi iteration), with exit rules.

    y_0 = argmax p(. | x),    y_i(j + 1) = argmax p(. | y_<i(j), x)    for all i > 0 at once

In a causal model the first slot that an iteration changes is itself right afterwards: everything
before it was a fixed point already. So every iteration proves at least one more token, the proven
ones are committed to the cache and never computed again, and the fixed point, in fewer than ``n``
iterations, is AR's greedy block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ceed_vla.backbones.base import Backbone, Prefix
from ceed_vla.decoding.exit_tracker import ExitTracker
from ceed_vla.decoding.host import check_rows, row_sums, to_host
from ceed_vla.decoding.registry import register_decoder
from ceed_vla.decoding.request import BlockRequest
from ceed_vla.decoding.result import DecodeResult
from ceed_vla.decoding.rows import Rows


@register_decoder("jacobi", "jacobi", "Jacobi decoding to the fixed point")
@torch.no_grad()
def decode_jacobi(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode a block from its guess until every row is at its fixed point or meets an exit rule.

    The first iteration computes the whole block, so that its tail is a useful warm start; later
    iterations stop at the end of the watched slots, unless the tail is "fresh". The tokens of a
    row that ended do not change while other rows continue. Frozen tokens cost no forward of their
    own: the first iteration reads them together with the guess behind them, leaves them unchanged,
    and proves the first free token. Several blocks can be decoded behind one prefix, which is
    rolled back at the start.

    Raises:
        TokenError: The guess is missing, or it or the frozen tokens have another shape or tokens
            outside the vocabulary.
        ConfigError: Executed steps or exit rules do not fit the block.
        NotFiniteError: The logits of a running row are NaN or infinite.
    """
    request = request.begun()
    block = JacobiBlock(backbone, prefix, request)  # y(0), the guess
    rows = block.rows
    exits = ExitTracker(
        request, prefix.logits, block.tokens, rows, watched=block.watched, frozen=block.frozen
    )
    observers, recorder = request.observers(block.tokens)
    while (span := block.next_span(prefix)) is not None:
        # Forward: every slot of the span at once, from the state before.
        logits, best, new = jacobi_iteration(backbone, prefix, block.tokens, span, rows.running)
        values = exits.measure(logits, new, span.start)
        # The one transfer to the host.
        fresh, sums, *measured = to_host(new, block.unchecked + row_sums(best), *values)
        block.check(sums)
        # Compare with the state before, and accept up to the first slot that changed.
        moved = block.accept(fresh, span)
        # Exit: rows that are proven, then rows that are good enough.
        rows.end_proven(block.watched, block.forwards)
        exits.end_rows(block.forwards, span.start, moved, measured)
        for observe in observers:
            observe(block.tokens, rows.exact, block.forwards)
        block.commit(prefix)
    return block.result(recorder.states if recorder else None)


class Span(NamedTuple):
    """Slots ``start .. end - 1``, which one iteration computes."""

    start: int
    end: int


def jacobi_iteration(
    backbone: Backbone, prefix: Prefix, tokens: Tensor, span: Span, running: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the k slots of `span` from the tokens in front of each, in place.

    Args:
        backbone: The model.
        prefix: The prefix; its cache holds the committed tokens, which are not read again.
        tokens: (B, n) the state; the slots of `span` are overwritten in running rows.
        span: The slots to compute.
        running: (B,) bool, rows whose tokens may change.

    Returns:
        Logits (B, k, V) of the slots, the largest logit (B, k) of each, and their tokens (B, k).
    """
    committed = prefix.cache.committed
    logits = backbone.block_logits(prefix, tokens[:, committed : span.end - 1])
    logits = logits[:, span.start - committed - 1 :]  # (B, k, V)
    best, new = logits.max(-1)  # (B, k)
    if not running.all():
        mask = torch.from_numpy(running).to(new.device).unsqueeze(1)
        new = torch.where(mask, new, tokens[:, span.start : span.end])
    tokens[:, span.start : span.end] = new
    return logits, best, new


class JacobiBlock:
    """The state of a block between iterations.

    Attributes:
        tokens: (B, n) int64 on the prefix's device, the newest state.
        frozen: Frozen tokens at its start.
        watched: End ``M`` of the slots that must be right.
        rows: Progress of every row.
        forwards: Iterations done.
        unchecked: (B, 1) `row_sums` of logits that are not checked yet: initially the prefix's.
    """

    def __init__(self, backbone: Backbone, prefix: Prefix, request: BlockRequest) -> None:
        self.request = request
        self.length = backbone.block_length
        self.tokens, self.frozen, self.watched = request.begin(backbone, prefix)
        self.host = self.tokens.cpu().numpy().copy()  # (B, n), the state to compare with
        # The prefix gives token 0; behind frozen tokens, the first free token takes a forward.
        self.rows = Rows(len(self.tokens), self.length, max(self.frozen, 1))
        self.forwards = 0
        self.unchecked: Tensor | int = row_sums(prefix.logits.amax(-1, keepdim=True))
        self._last = self.length if request.config.tail == "fresh" else self.watched
        if request.stop is not None:
            self.rows.end(self.host[:, 0] == request.stop, "stop", 0)

    def next_span(self, prefix: Prefix) -> Span | None:
        """The slots of the next iteration; None when every row has ended."""
        if not self.rows.running.any():
            return None
        window = self.request.config.window or self.length
        if self.forwards:
            end = min(self._last, prefix.cache.committed + 1 + window)
        else:
            end = min(self.length, max(self.frozen, 1) + window)
        start = max(prefix.cache.committed + 1, self.frozen)
        return Span(start, end) if end > max(self.frozen, 1) else None

    def check(self, sums: np.ndarray) -> None:
        """Check the `row_sums` (B, 1) of an iteration; raises `NotFiniteError`."""
        check_rows(sums, self.rows.running if self.forwards else None)
        self.unchecked = 0
        self.forwards += 1

    def accept(self, fresh: np.ndarray, span: Span) -> np.ndarray:
        """Compare the new tokens (B, k) of `span` with the old ones, accept them up to the first
        that changed, and store all of them.

        Returns:
            Bins (B, M) by which each watched token moved.
        """
        old = self.host[:, span.start : span.end]
        self.rows.accept(old, fresh, span.start)
        moved = np.zeros((len(fresh), self.watched), dtype=np.int64)
        watched = max(self.watched - span.start, 0)
        moved[:, span.start : span.end] = np.abs(fresh - old)[:, :watched]
        self.host[:, span.start : span.end] = fresh
        if self.request.stop is not None:
            proven = np.arange(span.start, span.end) < self.rows.exact[:, None]  # (B, k)
            stopped = (fresh == self.request.stop) & proven
            self.rows.end(stopped.any(1), "stop", self.forwards)
        return moved

    def commit(self, prefix: Prefix) -> None:
        """Commit the tokens that are proven in all running rows, except the last one.

        The last proven token is an input of the next iteration; everything before it is final.
        """
        if self.rows.running.any():
            prefix.cache.commit(self.rows.proven - 1 - prefix.cache.committed)

    def result(self, states: list[Tensor] | None) -> DecodeResult:
        """The result, when all rows have ended."""
        if isinstance(self.unchecked, Tensor):  # there was no forward
            check_rows(self.unchecked.cpu().numpy())
        tokens, states = self.request.finished(self.tokens, states)
        return self.rows.result(tokens, self.forwards, states)
