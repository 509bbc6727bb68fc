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


@register_decoder("jacobi", "jacobi", "to the fixed point")
@torch.no_grad()
def decode_jacobi(backbone: Backbone, prefix: Prefix, request: BlockRequest) -> DecodeResult:
    """Decode a block from its guess until every row is at its fixed point or meets an exit rule.

    The first iteration computes the whole block, so that its tail is a useful warm start; the next
    ones stop at the watched slots, unless the tail is to be fresh. Rows that are done keep their
    tokens while the others go on. A frozen prefix costs no forward of its own: the first iteration
    reads it together with the guess behind it, keeps it, and proves the first free token. Several
    blocks may be decoded behind one prefix, which is rolled back at the start.

    Raises:
        TokenError: No guess, or a guess or frozen tokens of another shape or with tokens outside
            the vocabulary.
        ConfigError: Executed steps or exit rules that do not fit the block.
        NotFiniteError: Scores of a running row are NaN or infinite.
    """
    request = request.begun()
    block = JacobiBlock(backbone, prefix, request)  # y(0), the guess
    rows = block.rows
    exits = ExitTracker(
        request, prefix.logits, block.tokens, rows, watched=block.watched, given=block.given
    )
    observers, recorder = request.observers(block.tokens)
    while (span := block.next_span(prefix)) is not None:
        # Forward: every slot of the span at once, from the state before.
        logits, best, new = jacobi_iteration(backbone, prefix, block.tokens, span, rows.running)
        wanted = exits.measure(logits, new, span.first)
        # The one transfer to the host.
        fresh, sums, *measured = to_host(new, block.unchecked + row_sums(best), *wanted)
        block.check(sums)
        # Compare with the state before, and accept up to the first slot that changed.
        moved = block.accept(fresh, span)
        # Exit: rows that are proven, then rows that are good enough.
        rows.end_proven(block.watched, block.forwards)
        exits.end_rows(block.forwards, span.first, moved, measured)
        for observe in observers:
            observe(block.tokens, rows.exact, block.forwards)
        block.commit(prefix)
    return block.result(recorder.states if recorder else None)


class Span(NamedTuple):
    """Slots ``first .. end - 1``, which one iteration computes."""

    first: int
    end: int


def jacobi_iteration(
    backbone: Backbone, prefix: Prefix, tokens: Tensor, span: Span, running: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the k slots of `span` from all `tokens` (B, n) that are not committed, in place.

    Returns their logits (B, k, V), the largest of them (B, k), and their tokens (B, k); rows that
    are not `running` keep theirs.
    """
    start = prefix.cache.committed
    logits = backbone.block_logits(prefix, tokens[:, start : span.end - 1])
    logits = logits[:, span.first - start - 1 :]  # (B, k, V)
    best, new = logits.max(-1)  # (B, k)
    if not running.all():
        mask = torch.from_numpy(running).to(new.device).unsqueeze(1)
        new = torch.where(mask, new, tokens[:, span.first : span.end])
    tokens[:, span.first : span.end] = new
    return logits, best, new


class JacobiBlock:
    """The state of a block between iterations.

    Attributes:
        tokens: (B, n) int64 on the prefix's device, the newest state.
        given: Frozen tokens at its start.
        watched: End ``M`` of the slots that must be right.
        rows: What is proven of every row.
        forwards: Iterations done.
        unchecked: (B, 1) `row_sums` of scores that the host has not seen: at first the prefix's.
    """

    def __init__(self, backbone: Backbone, prefix: Prefix, request: BlockRequest) -> None:
        self.request = request
        self.length = backbone.block_length
        self.tokens, self.given, self.watched = request.begin(backbone, prefix)
        self.host = self.tokens.cpu().numpy().copy()  # (B, n), the state to compare with
        # Without frozen tokens the prefix gives token 0; behind them the first free token takes a
        # forward.
        self.rows = Rows(len(self.tokens), self.length, max(self.given, 1))
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
            end = min(self.length, max(self.given, 1) + window)
        first = max(prefix.cache.committed + 1, self.given)
        return Span(first, end) if end > max(self.given, 1) else None

    def check(self, sums: np.ndarray) -> None:
        """Check the scores (B, 1) of an iteration; raises `NotFiniteError`."""
        check_rows(sums, self.rows.running if self.forwards else None)
        self.unchecked = 0
        self.forwards += 1

    def accept(self, fresh: np.ndarray, span: Span) -> np.ndarray:
        """Compare the new tokens (B, k) of `span` with the old ones, prove what they prove, and
        keep them.

        Returns by how many bins (B, M) each watched token moved.
        """
        old = self.host[:, span.first : span.end]
        self.rows.accept(old, fresh, span.first)
        moved = np.zeros((len(fresh), self.watched), dtype=np.int64)
        watched = max(self.watched - span.first, 0)
        moved[:, span.first : span.end] = np.abs(fresh - old)[:, :watched]
        self.host[:, span.first : span.end] = fresh
        if self.request.stop is not None:
            proven = np.arange(span.first, span.end) < self.rows.exact[:, None]  # (B, k)
            stopped = (fresh == self.request.stop) & proven
            self.rows.end(stopped.any(1), "stop", self.forwards)
        return moved

    def commit(self, prefix: Prefix) -> None:
        """Make the cache keep what is proven in all running rows.

        The last proven slot is an input of the next iteration; everything before it is final.
        """
        if self.rows.running.any():
            prefix.cache.commit(self.rows.proven - 1 - prefix.cache.committed)

    def result(self, states: list[Tensor] | None) -> DecodeResult:
        """The result, when all rows have ended."""
        if isinstance(self.unchecked, Tensor):  # there was no forward
            check_rows(self.unchecked.cpu().numpy())
        tokens, states = self.request.finished(self.tokens, states)
        return self.rows.result(tokens, self.forwards, states)
