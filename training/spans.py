"""Draw streamed frames from a few spans at a time, because decoding one decodes its neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ceed_vla.data.frames import FrameStore


class SlidingSpans:
    """Draws rows from `most` open spans, which move over all spans in a new order in every pass.

    On average, a span is replaced by the next one after as many draws as it has rows, so that an
    epoch decodes every span once. The draws depend on the seed and the number of rows drawn before,
    so that a resumed run needs no state.

    Args:
        edges: First row of every span, and one past the last row (W + 1,).
        most: Spans that are open at once, fewer than W.
        seed: Seed of the order.
        rows: Values to draw (N,), in the order that `edges` counts; 0..N-1 if None.
    """

    def __init__(
        self, edges: NDArray[np.int64], most: int, seed: int, rows: NDArray[np.int64] | None = None
    ) -> None:
        self.edges = edges
        self.most = most
        self.rows = rows
        self.count = len(edges) - 1
        # The open spans belong to at most two passes.
        self._pass = lru_cache(2)(
            lambda number: np.random.default_rng([seed, number, 2]).permutation(self.count)
        )

    def open(self, drawn: float) -> NDArray[np.int64]:
        """The spans that are open after `drawn` rows."""
        first = int(drawn * self.count / int(self.edges[-1]))
        places = range(first, first + self.most)
        return np.array([self._pass(place // self.count)[place % self.count] for place in places])

    def draw(self, random: np.random.Generator, size: int, drawn: float) -> NDArray[np.int64]:
        """Draw rows (size,) uniformly from the open spans, after `drawn` rows."""
        spans = self.open(drawn)
        ends = np.cumsum(self.edges[spans + 1] - self.edges[spans])
        picks = random.integers(int(ends[-1]), size=size)
        places = np.searchsorted(ends, picks, side="right")
        found = self.edges[spans[places] + 1] - ends[places] + picks
        return found if self.rows is None else self.rows[found]


def sliding(
    edges: NDArray[np.int64], most: float, seed: int, rows: NDArray[np.int64] | None = None
) -> SlidingSpans | None:
    """Sliding spans; None if `most` covers all spans, so that draws are from all rows."""
    return SlidingSpans(edges, max(1, int(most)), seed, rows) if most < len(edges) - 1 else None


def row_spans(
    stores: Sequence[FrameStore],
    root: NDArray[np.int64],
    frame: NDArray[np.int64],
    rows: NDArray[np.int64],
    seed: int,
) -> SlidingSpans | None:
    """Sliding spans for `rows` (R,) of a table over datasets.

    Row i is frame ``frame[i]`` of ``stores[root[i]]``.
    """
    most = min(store.together for store in stores)
    if math.isinf(most):
        return None
    rows = rows[np.lexsort((frame[rows], root[rows]))]
    span = np.empty(len(rows), np.int64)
    seen = 0
    for index, store in enumerate(stores):
        own = root[rows] == index
        span[own] = seen + np.searchsorted(store.edges, frame[rows[own]], side="right")
        seen += len(store.edges)
    return sliding(
        np.append(np.flatnonzero(np.diff(span, prepend=-1)), len(rows)), most, seed, rows
    )
