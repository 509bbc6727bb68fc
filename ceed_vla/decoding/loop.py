"""Parallel decoding of one block as a fixed point (Jacobi iteration), with exit rules.

    y_0 = argmax p(. | x),    y_i(j + 1) = argmax p(. | y_<i(j), x)    for all i > 0 at once

In a causal model the first slot that an iteration changes is itself right afterwards: everything
before it was a fixed point already. So every iteration proves at least one more token, the proven
ones are committed to the cache and never computed again, and the fixed point, in fewer than ``n``
iterations, is AR's greedy block.

This file runs on the host and imports no torch. The forwards belong to an engine: torch
(`ceed_vla.decoding.jacobi`) or an exported graph (`ceed_vla.edge`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ceed_vla.decoding.config import DecodingConfig
from ceed_vla.decoding.exit_tracker import ExitTracker
from ceed_vla.decoding.finite import check_rows
from ceed_vla.decoding.rows import Rows


class Span(NamedTuple):
    """Slots ``start .. end - 1``, which one iteration computes."""

    start: int
    end: int


class Computed(NamedTuple):
    """What one iteration computed, on the host."""

    tokens: np.ndarray  # (B, k) int64 of the slots of the span; unchanged in rows that ended
    # (B, 1) float32, not finite if a logit of the row is NaN or +inf; see `finite`
    sums: np.ndarray
    # Per exit rule that measures, (B, w) of the ``w`` watched slots of the span.
    measured: Sequence[np.ndarray]


class Forwards(Protocol):
    """The forwards of one block, as an engine runs them.

    Attributes:
        tokens: (B, n) the newest state, in the engine's own kind of array.
    """

    tokens: Any

    @property
    def committed(self) -> int:
        """Block tokens whose keys and values are final, and which no forward reads again."""

    def iterate(self, span: Span, running: np.ndarray) -> Computed:
        """Compute the slots of `span` from the tokens in front of each, in place.

        Rows that are not `running` (B,) keep their tokens. This is the one transfer to the host.
        """

    def commit(self, count: int) -> None:
        """Make the keys and values of the next `count` tokens final."""


class JacobiBlock:
    """The state of a block between iterations, on the host.

    Args:
        tokens: (B, n) int64 the guess, with the prefix's token in slot 0 unless that is frozen.
        config: The decoding.
        frozen: Frozen tokens at the start.
        watched: End ``M`` of the slots that must be right.
        stop: Token that ends a row as soon as it is proven; None if blocks have fixed length.

    Attributes:
        tokens: The newest state.
        rows: Progress of every row.
        forwards: Iterations done.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        config: DecodingConfig,
        *,
        frozen: int,
        watched: int,
        stop: int | None,
    ) -> None:
        batch, self.length = tokens.shape
        self.tokens = tokens
        self.frozen = frozen
        self.watched = watched
        self.stop = stop
        # The prefix gives token 0; behind frozen tokens, the first free token takes a forward.
        self.rows = Rows(batch, self.length, max(frozen, 1))
        self.forwards = 0
        self._first: np.ndarray | None = None  # (B,) rows that the first forward must read; all
        self._window = config.window or self.length
        self._last = self.length if config.tail == "fresh" else watched
        if stop is not None:
            self.rows.end(tokens[:, 0] == stop, "stop", 0)

    def settle(self, rows: np.ndarray) -> None:
        """End `rows` (B,) that ended before the block: they keep their tokens."""
        self.rows.end(rows, "settled", 0)
        self._first = ~rows

    def next_span(self, committed: int) -> Span | None:
        """The slots of the next iteration behind the `committed` ones; None when every row has
        ended, or the block has no slot behind the first.
        """
        if not self.rows.running.any():
            return None
        if self.forwards:
            end = min(self._last, committed + 1 + self._window)
        else:
            end = min(self.length, max(self.frozen, 1) + self._window)
        start = max(committed + 1, self.frozen)
        return Span(start, end) if end > max(self.frozen, 1) else None

    def check(self, sums: np.ndarray) -> None:
        """Count an iteration and check its `Computed.sums`; raises `NotFiniteError`."""
        check_rows(sums, self.rows.running if self.forwards else self._first)
        self.forwards += 1

    def accept(self, fresh: np.ndarray, span: Span) -> np.ndarray:
        """Compare the new tokens (B, k) of `span` with the old ones, accept them up to the first
        that changed, and store all of them.

        Returns:
            Bins (B, M) by which each watched token moved.
        """
        old = self.tokens[:, span.start : span.end]
        self.rows.accept(old, fresh, span.start)
        moved = np.zeros((len(fresh), self.watched), dtype=np.int64)
        watched = max(self.watched - span.start, 0)
        moved[:, span.start : span.end] = np.abs(fresh - old)[:, :watched]
        self.tokens[:, span.start : span.end] = fresh
        if self.stop is not None:
            proven = np.arange(span.start, span.end) < self.rows.exact[:, None]  # (B, k)
            stopped = (fresh == self.stop) & proven
            self.rows.end(stopped.any(1), "stop", self.forwards)
        return moved


def iterate(
    block: JacobiBlock,
    forwards: Forwards,
    exits: ExitTracker,
    observers: Sequence[Callable[[Any, np.ndarray, int], None]] = (),
) -> None:
    """Iterate a block from its guess until every row is at its fixed point or meets an exit rule.

    The first iteration computes the whole block, so that its tail is a useful warm start; later
    iterations stop at the end of the watched slots, unless the tail is "fresh". The tokens of a
    row that ended do not change while other rows continue. Frozen tokens cost no forward of their
    own: the first iteration reads them together with the guess behind them, leaves them unchanged,
    and proves the first free token.

    Raises:
        NotFiniteError: The logits of a running row are NaN or infinite.
    """
    rows = block.rows
    while (span := block.next_span(forwards.committed)) is not None:
        # Forward: every slot of the span at once, from the state before.
        computed = forwards.iterate(span, rows.running)
        block.check(computed.sums)
        # Compare with the state before, and accept up to the first slot that changed.
        moved = block.accept(computed.tokens, span)
        # Exit: rows that are proven, then rows that are good enough.
        rows.end_proven(block.watched, block.forwards)
        exits.end_rows(block.forwards, span.start, moved, computed.measured)
        for observe in observers:
            observe(forwards.tokens, rows.exact, block.forwards)
        # The last proven token is an input of the next iteration; everything before it is final.
        if rows.running.any():
            forwards.commit(rows.proven - 1 - forwards.committed)
